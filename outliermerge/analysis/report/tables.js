'use strict';

// Tables, and what a merge's manifest and its drift show.

const ROWS_AT_ONCE = 300;

function element(tag, text) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  return made;
}

function tableRow(cells) {
  const row = element('tr');
  row.append(...cells.map(cell => element('td', cell)));
  return row;
}

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
      (value, row) => `${shown(value)} ± ${shown(row.std_std)}`),
    spreadColumn('kurtosis of all', 'kurtosis_before', 1, 2),
    spreadColumn('kurtosis without small', 'kurtosis_without_small', 1, 2),
    spreadColumn('beyond 2σ, %', 'outside_2_ratio', 100, 2),
    spreadColumn('beyond 3σ, %', 'outside_3_ratio', 100, 2),
    column('forms', row => row.labels),
  ];
}

function modelNames() {
  return DATA.merge.inputs.filter(each => each.role === 'model')
    .map(each => each.model.split('/').filter(Boolean).pop());
}

function mergeColumns() {
  const columns = [column('tensor', row => row.name), column('action', row => row.action)];
  for (const key of DATA.merge.statistics) {
    const width = Math.max(1, ...DATA.merge.tensors.map(each => [each.numbers[key]].flat().length));
    for (let i = 0; i < width; i++) {
      const suffix = width > 1 ? `, ${modelNames()[i] ?? i + 1}` : '';
      columns.push(column(key + suffix, row => [row.numbers[key] ?? null].flat()[i] ?? null));
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
  model: ['Models, as in the paper’s Tables 1 and 6', () => groupColumns('model'),
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
  const [, makeColumns, makeRows] = TABLES[state.table];
  const columns = makeColumns(), wanted = state.filter.toLowerCase();
  const all = makeRows().filter(row => row.name.toLowerCase().includes(wanted));
  const rows = state.sorted === null ? all : sortRows(all, columns[state.sorted]);
  const some = state.allRows ? rows : rows.slice(0, ROWS_AT_ONCE);
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
    ? `${some.length} of ${rows.length} rows` : `${rows.length} rows`;
  byId('all-rows').hidden = some.length === rows.length;
  const { filter } = SUBJECTS[state.subject];
  byId('tables-text').textContent = `Ratio is the share inside ${filter}σ; skewness and kurtosis `
    + 'are of that share. Groups are of matrices, mean ± standard deviation. An exact Gaussian '
    + 'inside 3σ has ratio 99.73% and kurtosis 2.83, not 3.';
}

function drawMerge() {
  const { merge } = DATA;
  const actions = Object.entries(merge.actions).map(([name, num]) => `${name} ${num}`).join(', ');
  const inputs = merge.inputs.map(each => `${each.model} (${each.role})`).join(', ');
  byId('merge-text').textContent = `From ${inputs}; tensors: ${actions}. `
    + `Made by outliermerge ${merge.versions.outliermerge ?? ''}.`;
  byId('recipe').textContent = merge.recipe;
  const { part } = currentTensor();
  const labels = distinct(merge.tensors.filter(each => each.part === part)
    .map(each => each.label));
  const wanted = labels.includes(state.mergeModule) ? state.mergeModule : currentTensor().label;
  fill(byId('merge-module'), labels.map(label => [label, label]), wanted);
  const tensors = merge.tensors.filter(each => each.part === part && each.label === wanted
    && each.numbers[state.mergeStatistic] !== undefined);
  const values = tensor => [tensor.numbers[state.mergeStatistic]].flat();
  const width = Math.max(0, ...tensors.map(each => values(each).length));
  const lines = Array.from({ length: width }, (_, i) => ({
    ...(linesOf(tensors, tensor => values(tensor)[i] ?? null, [])[0] ?? { points: [] }),
    name: width > 1 ? modelNames()[i] ?? String(i + 1) : state.mergeStatistic, look: i,
  }));
  plotLines(byId('merge-plot'), lines, layersOf(tensors), state.mergeStatistic ?? '',
    { nothing: 'The manifest has no such number of layers here.' });
}

function driftMeasures() {
  return DATA.drift.has_base ? [
    ['distance', 'distance ‖W* − Wᵢ‖ / ‖ΔWᵢ‖'], ['cosine', 'cosine of ΔW* and ΔWᵢ'],
    ['length', 'length ‖ΔW*‖ / ‖ΔWᵢ‖'], ['base', 'from the base, ‖ΔW*‖ / ‖W*‖'],
  ] : [
    ['distance', 'distance ‖W* − Wᵢ‖ / ‖Wᵢ‖'], ['cosine', 'cosine of W* and Wᵢ'],
    ['length', 'length ‖W*‖ / ‖Wᵢ‖'],
  ];
}

function drawDrift() {
  const names = DATA.drift.models, measures = driftMeasures(), all = DATA.drift.tensors;
  byId('drift-text').textContent = DATA.drift.has_base
    ? 'W* is the output, ΔW* its difference from the base, Wᵢ and ΔWᵢ those of a task model. '
      + 'At distance 0 and cosine 1 the output is the task model. All tensors together:'
    : 'W* is the output, Wᵢ a model that went into it. All tensors together:';
  byId('drift-table').tHead.replaceChildren(tableRow(['', ...measures.map(each => each[1])]));
  byId('drift-table').tBodies[0].replaceChildren(...names.map((name, model) =>
    tableRow([name, ...measures.map(([measure]) => shown(drift(all, measure, model)))])));
  const { part } = currentTensor();
  const isShown = each => each.part === part
    && (state.vectors || SUBJECTS[state.subject].byName.get(each.name)?.is_matrix);
  const tensors = all.filter(isShown), layers = layersOf(tensors);
  const modules = distinct(tensors.map(each => each.label));
  const title = measures.find(([measure]) => measure === state.driftMeasure)[1];
  const value = members => drift(members, state.driftMeasure, state.driftModel);
  const name = state.driftMeasure === 'base' ? '' : `, ${names[state.driftModel]}`;
  plotHeat(byId('drift-plot'), cellsOf(tensors, value, modules, layers.length), layers, modules,
    title + name);
  onCell(byId('drift-plot'));
  drawDriftDepth(tensors, layers, title, names);
}

function drawDriftDepth(tensors, layers, title, names) {
  const shownNames = state.driftMeasure === 'base' ? ['output'] : names;
  const lines = shownNames.map((name, model) => ({ name, look: model, points: layers
    .map((layer, depth) => [depth, tensors.filter(each => each.depth === depth), layer])
    .filter(([, members]) => members.length)
    .map(([depth, members, layer]) =>
      [depth, drift(members, state.driftMeasure, model), `${name}, layer ${layer}`]) }));
  plotLines(byId('drift-depth-plot'), lines, layers, title);
}
