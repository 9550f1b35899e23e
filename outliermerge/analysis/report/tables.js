'use strict';

// Tables of all rows, to be sorted and filtered.

const ROWS_AT_ONCE = 300;

const column = (title, value, text = shown) => ({ title, value, text });
const share = (title, key) =>
  column(title, row => (row[key] === null ? null : 100 * row[key]),
    value => (value === null ? '–' : fixed(value, 2)));

// Rounding makes a negative zero of what is a little less than it.
function fixed(value, digits) {
  return value.toFixed(digits).replace(/^-(0\.?0*)$/, '$1');
}

function tensorColumns() {
  const columns = [
    column('tensor', row => row.name), column('shape', row => row.num_elements,
      (_, row) => row.shape.join(' × ')),
    column('elements', row => row.num_elements), column('form', row => row.form),
  ];
  for (const [key, title] of Object.entries(DATA.statistics)) {
    columns.push(key.endsWith('_ratio') ? share(title, key) : column(title, row => row[key]));
  }
  columns.push(column('infinite or NaN', row => row.num_non_finite));
  return columns;
}

function spreadColumn(title, key, scale, digits) {
  return column(title, row => row[`${key}_mean`], (value, row) => (value === null ? '–'
    : `${fixed(scale * value, digits)} ± ${fixed(scale * row[`${key}_std`], digits)}`));
}

function groupColumns(name) {
  return [
    column(name, row => row.name), column('matrices', row => row.num_tensors),
    column('elements', row => row.num_elements),
    spreadColumn('ratio, %', 'kept_ratio', 100, 2), spreadColumn('skewness', 'skewness', 1, 2),
    spreadColumn('kurtosis', 'kurtosis', 1, 2),
    column('σ', row => row.std_mean,
      (value, row) => (value === null ? '–' : withDeviation(value, row.std_std))),
    spreadColumn('kurtosis of all', 'kurtosis_before', 1, 2),
    spreadColumn('kurtosis without small', 'kurtosis_without_small', 1, 2),
    spreadColumn('beyond 2σ, %', 'outside_2_ratio', 100, 2),
    spreadColumn('beyond 3σ, %', 'outside_3_ratio', 100, 2),
    column('forms', row => row.labels),
  ];
}

function mergeColumns() {
  const columns = [column('tensor', row => row.name), column('action', row => row.action)];
  for (const series of Object.keys(DATA.merge.series)) {
    for (const line of linesOfSeries(series)) {
      columns.push(column(line ? `${series}, ${line}` : series,
        row => row.numbers[series]?.[line] ?? null));
    }
  }
  return columns;
}

function driftColumns() {
  const columns = [column('tensor', row => row.name)];
  for (const [measure, title] of driftMeasures()) {
    if (measure === 'base') columns.push(column(title, row => drift([row], measure, 0)));
    else DATA.drift.models.forEach((_, model) => columns.push(
      column(`${title}, ${DATA.drift.models[model]}`, row => drift([row], measure, model))));
  }
  return columns;
}

const TABLES = {
  model: [isOfMinSigma() ? 'Models, as in the paper' : 'Models', () => groupColumns('model'),
    () => SUBJECTS.map(each => ({ ...each.groups.model[0], name: subjectTitle(each) }))],
  modules: ['Types of module', () => groupColumns('module'),
    () => SUBJECTS[state.subject].groups.modules],
  layers: ['Layers', () => groupColumns('layer'), () => SUBJECTS[state.subject].groups.layers],
  tensors: ['Tensors', tensorColumns, () => SUBJECTS[state.subject].tensors],
};
if (DATA.merge) TABLES.merge = ['The merge, by tensor', mergeColumns, () => DATA.merge.tensors];
if (DATA.drift) TABLES.drift = ['Drift, by tensor', driftColumns, () => DATA.drift.tensors];

function sortRows(rows, { value }) {
  const sign = state.ascending ? 1 : -1;
  // What has no value stands last, whichever way is sorted.
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a) ?? null, value(b) ?? null];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === 'string' ? x.localeCompare(y, 'en', { numeric: true }) : x - y);
  });
}

function headOf(columns) {
  const row = element('tr');
  columns.forEach(({ title }, i) => {
    const cell = element('th'), button = element('button', title);
    cell.scope = 'col';
    cell.setAttribute('aria-sort', i !== state.sorted ? 'none'
      : state.ascending ? 'ascending' : 'descending');
    button.type = 'button';
    button.addEventListener('click', () => {
      update({ sorted: i, ascending: state.sorted === i ? !state.ascending : i === 0 });
      byId('statistics').tHead.rows[0].cells[i].firstChild.focus();
    });
    cell.append(button);
    row.append(cell);
  });
  return row;
}

function drawTable() {
  const [title, makeColumns, makeRows] = TABLES[state.table];
  const columns = makeColumns(), wanted = state.filter.toLowerCase();
  const all = makeRows().filter(row => row.name.toLowerCase().includes(wanted));
  const rows = state.sorted === null ? all : sortRows(all, columns[state.sorted]);
  const some = state.allRows ? rows : rows.slice(0, ROWS_AT_ONCE);
  byId('statistics').caption.textContent = title;
  byId('statistics').tHead.replaceChildren(headOf(columns));
  byId('statistics').tBodies[0].replaceChildren(...some.map(row => {
    const made = tableRow(columns.map(({ value, text }) => text(value(row) ?? null, row)));
    if (SUBJECTS[state.subject].byName.has(row.name)) {
      const button = element('button', row.name);
      button.type = 'button';
      button.addEventListener('click', () => select(row.name, true));
      made.cells[0].replaceChildren(button);
    }
    return made;
  }));
  byId('num-rows').textContent = some.length < rows.length
    ? `${some.length} of ${rows.length} rows` : `${rows.length} ${rows.length === 1 ? 'row' : 'rows'}`;
  byId('all-rows').hidden = some.length === rows.length;
  const { filter } = SUBJECTS[state.subject];
  byId('tables-text').textContent = `Ratio is the share inside ${filter}σ; skewness and kurtosis `
    + 'are of that share. Groups are of matrices, mean ± standard deviation. An exact Gaussian '
    + 'inside 3σ has ratio 99.73% and kurtosis 2.83, not 3.'
    + (isOfMinSigma() ? ' The models’ rows are those of Tables 1 and 6 of arXiv 2501.10661.' : '');
  showCues();
}
