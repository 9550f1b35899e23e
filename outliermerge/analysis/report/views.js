'use strict';

// What each section shows of the state; `main.js` says when.

const DATA = JSON.parse(document.getElementById('data').textContent);
const GRID = { width: 2 * DATA.half_width / DATA.bins, halfWidth: DATA.half_width };
// Columns become one object a tensor once, so that the rest reads plainly.
const SUBJECTS = DATA.subjects.map(subject => {
  const keys = Object.keys(subject.columns);
  const tensors = subject.columns.name.map((_, i) =>
    Object.fromEntries(keys.map(key => [key, subject.columns[key][i]])));
  return { ...subject, tensors, byName: new Map(tensors.map(each => [each.name, each])) };
});

function byId(id) {
  return document.getElementById(id);
}

function shown(value) {
  if (value === null || value === undefined) return '–';
  if (typeof value !== 'number') return String(value);
  if (Number.isInteger(value)) return value.toLocaleString('en');
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(3) : value.toPrecision(4);
}

// Returns a mean with the digits that its deviation leaves, at most three, as model cards do.
function withDeviation(value, deviation) {
  const most = 2 - (value ? Math.floor(Math.log10(Math.abs(value))) : 0);
  let digits = most;
  if (deviation > 0) {
    digits = -Math.floor(Math.log10(deviation));
    if (Math.round(deviation * 10 ** digits) === 1) digits += 1;
  }
  digits = Math.max(0, Math.min(digits, most));
  const doubt = (deviation ?? 0).toFixed(digits);
  return value.toFixed(digits) + (Number(doubt) ? ` ± ${doubt}` : '');
}

function percent(share, digits = 2) {
  return share === null || !Number.isFinite(share) ? '–' : `${(100 * share).toFixed(digits)}%`;
}

// Shares are kept as 0 to 1 and shown as percent, as the paper's tables do.
function statistic(tensor, key) {
  const value = tensor[key];
  return key.endsWith('_ratio') && value !== null ? 100 * value : value;
}

function kind(subject) {
  return subject.base === null ? 'W' : 'ΔW';
}

function subjectTitle(subject) {
  return subject.base === null ? `W of ${subject.title}` : `ΔW of ${subject.title}`;
}

function distinct(values) {
  return [...new Set(values)];
}

// Returns names as a sentence has them; of many names the first.
function listed(names, most = Infinity) {
  if (names.length > most) {
    return `${names.slice(0, most - 1).join(', ')} and ${names.length - most + 1} more`;
  }
  return names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} and ${names.at(-1)}`;
}

function partName(part) {
  return part || 'outside layers';
}

function tensorsOf(subject, part) {
  return subject.tensors.filter(each =>
    each.part === part && (state.vectors || each.is_matrix || each.name === state.tensor));
}

function layersOf(tensors) {
  const found = new Map(tensors.map(each => [each.depth ?? 0, each.layer]));
  const labels = [];
  for (const [depth, layer] of found) labels[depth] = layer;
  return Array.from(labels, label => label ?? '');
}

function currentTensor() {
  return SUBJECTS[state.subject].byName.get(state.tensor);
}

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

// Fills a small table, whose first column names its rows.
function fillTable(table, titles, rows) {
  const head = element('tr');
  head.append(...titles.map(title => {
    const cell = element(title ? 'th' : 'td', title);
    if (title) cell.scope = 'col';
    return cell;
  }));
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows.map(([name, ...cells]) => {
    const row = tableRow(cells), first = element('th', name);
    first.scope = 'row';
    row.prepend(first);
    return row;
  }));
}

function drawDistribution() {
  const tensor = currentTensor();
  byId('tensor-name').textContent = tensor.name;
  const what = kind(SUBJECTS[state.subject]) === 'W' ? 'weight' : 'change ΔW';
  plotDensity(byId('density-plot'), tensor, GRID, state.log, what);
  plotQq(byId('qq-plot'), tensor, GRID);
  byId('comb').hidden = !tensor.histogram || !isComb(tensor, GRID);
  const { filter } = SUBJECTS[state.subject];
  const facts = [
    ['shape', tensor.shape.join(' × ') || 'scalar'], ['elements', shown(tensor.num_elements)],
    ['mean', shown(tensor.mean)], ['σ', shown(tensor.std)],
    [`inside ${filter}σ`, percent(tensor.kept_ratio)],
    ['beyond 2σ', percent(tensor.outside_2_ratio)],
    ['beyond 3σ', percent(tensor.outside_3_ratio)],
    [`skewness, inside ${filter}σ`, shown(tensor.skewness)],
    [`kurtosis, inside ${filter}σ`, shown(tensor.kurtosis)],
    ['kurtosis of all', shown(tensor.kurtosis_before)],
    ['smallest, largest', `${shown(tensor.minimum)}, ${shown(tensor.maximum)}`],
    ['shape of the histogram', shown(tensor.form)],
  ];
  if (tensor.num_non_finite) facts.push(['infinite or NaN', shown(tensor.num_non_finite)]);
  const far = tensor.histogram ? tensor.histogram.below + tensor.histogram.above : 0;
  if (far) facts.push([`beyond ±${DATA.half_width}σ, not drawn`, shown(far)]);
  byId('facts').replaceChildren(...facts.map(([name, value]) => {
    const pair = document.createElement('div');
    pair.append(element('dt', name), element('dd', value));
    return pair;
  }));
}

// A large model has hundreds of matrices: of so many only what is scrolled to is drawn.
const MAX_UNSEEN_PICTURES = 60;
const galleryObserver = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) drawPicture(entry.target);
}, { rootMargin: '200px' });

function drawPicture(picture) {
  galleryObserver.unobserve(picture);
  const tensor = SUBJECTS[state.subject].byName.get(picture.dataset.name);
  if (tensor) plotSmall(picture, tensor, GRID, state.picture, state.log);
}

// Draws so many of the gallery's first pictures that were not scrolled to; tells how many.
function drawPictures(num) {
  const all = [...byId('gallery-grid').querySelectorAll('.small')].slice(0, MAX_UNSEEN_PICTURES);
  const left = all.filter(each => !each.hasChildNodes()).slice(0, num);
  left.forEach(drawPicture);
  return left.length;
}

function drawGallery() {
  const tensor = currentTensor();
  const key = state.gallery === 'layer' ? 'layer' : 'label';
  byId('gallery-of').hidden = tensor.part === '';
  const members = tensorsOf(SUBJECTS[state.subject], tensor.part)
    .filter(each => each.part === '' || each[key] === tensor[key]);
  galleryObserver.disconnect();
  for (const old of byId('gallery-grid').querySelectorAll('.js-plotly-plot')) Plotly.purge(old);
  byId('gallery-grid').replaceChildren(...members.map(each => {
    const button = element('button');
    button.type = 'button';
    button.setAttribute('aria-pressed', String(each.name === state.tensor));
    button.title = each.name;
    button.addEventListener('click', () => select(each.name, true));
    const picture = element('div');
    picture.className = 'small';
    picture.dataset.name = each.name;
    const place = each.layer && state.gallery === 'module' ? `layer ${each.layer}` : each.label;
    button.append(element('span', place), picture,
      element('span', `σ ${shown(each.std)}, kurtosis ${shown(each.kurtosis)}`));
    galleryObserver.observe(picture);
    return button;
  }));
}

// Returns a line for each type of module: mean of a value over its tensors at each depth. They are
// in one order whatever that of the files, so that a module looks the same in all plots.
function linesOf(tensors, value, suffix = '') {
  return distinct(tensors.map(each => each.label)).sort().map((label, look) => {
    const cells = new Map();
    for (const each of tensors) {
      if (each.label !== label || each.depth === null) continue;
      if (!cells.has(each.depth)) cells.set(each.depth, []);
      cells.get(each.depth).push(each);
    }
    const points = [...cells].sort((a, b) => a[0] - b[0]).map(([depth, members]) =>
      [depth, mean(members.map(value)), `${label}, layer ${members[0].layer}${suffix}`]);
    return { name: label, look, points };
  });
}

// Whether there is anything to draw against depth.
function hasDepth() {
  return SUBJECTS.some(({ tensors }) => tensors.some(each => each.depth > 0));
}

// Without a module each line is a type of module of one model; with one, each line is a model.
function drawDepth() {
  const { part } = currentTensor(), module = state.depthModule;
  const kinds = distinct(SUBJECTS.map(kind));
  const plots = kinds.map(each => {
    const subjects = SUBJECTS.filter(subject => kind(subject) === each);
    if (module) {
      const tensors = subjects.map(subject =>
        tensorsOf(subject, part).filter(tensor => tensor.label === module));
      const lines = subjects.map(({ title }, look) => ({
        points: [], ...linesOf(tensors[look], tensor => tensor.std, `, ${title}`)[0],
        name: title, look }));
      return { title: `σ of ${each}, ${module}`, lines, labels: layersOf(tensors.flat()) };
    }
    const { title } = SUBJECTS[state.subject];
    const subject = subjects.find(one => one.title === title);
    if (!subject) return null;
    const tensors = tensorsOf(subject, part);
    return { title: `σ of ${subjectTitle(subject)}`, labels: layersOf(tensors),
      lines: linesOf(tensors, tensor => tensor.std) };
  }).filter(Boolean);
  const several = kinds.some(each =>
    SUBJECTS.filter(subject => kind(subject) === each).length > 1);
  byId('depth-text').textContent = (module ? 'Each line is a model.'
    : 'Each line is a type of module.') + (several && !module
    ? ' Choose one module to see the models side by side.' : '');
  const place = byId('depth-plots');
  for (const old of place.querySelectorAll('.plot')) {
    if (place.querySelectorAll('.plot').length <= plots.length) break;
    if (old.nextElementSibling?.classList.contains('more-lines')) old.nextElementSibling.remove();
    old.remove();
  }
  while (place.querySelectorAll('.plot').length < plots.length) {
    const plot = element('div');
    plot.className = 'plot';
    plot.setAttribute('role', 'figure');
    place.append(plot);
  }
  const places = place.querySelectorAll('.plot');
  plots.forEach(({ title, lines, labels }, i) =>
    plotLines(places[i], lines, labels, title, { scale: state.depthScale }));
}

function cellsOf(tensors, value, modules, numLayers) {
  return modules.map(module => Array.from({ length: numLayers }, (_, depth) => {
    const members = tensors.filter(each => each.label === module && (each.depth ?? 0) === depth);
    if (!members.length) return null;
    const text = members.length > 1 ? `${members[0].name} and ${members.length - 1} more`
      : members[0].name;
    return { value: value(members), text, name: members[0].name };
  }));
}

function drawHeat() {
  const tensors = tensorsOf(SUBJECTS[state.subject], currentTensor().part);
  const modules = distinct(tensors.map(each => each.label)), layers = layersOf(tensors);
  const value = members => mean(members.map(each => statistic(each, state.statistic)));
  // A mean near 0 is small beside σ, however its digits differ.
  const least = state.statistic === 'mean' ? 0.2 * mean(tensors.map(each => each.std))
    : DATA.least_span[state.statistic];
  plotHeat(byId('heat-plot'), cellsOf(tensors, value, modules, layers.length), layers, modules,
    DATA.statistics[state.statistic], least);
  onCell(byId('heat-plot'));
}

function onCell(plot) {
  if (!plot.on || plot.dataset.bound) return;
  plot.dataset.bound = 'yes';
  plot.on('plotly_click', event => {
    const name = event.points[0].customdata;
    if (name && SUBJECTS[state.subject].byName.has(name)) select(name, true);
  });
}

// The task vectors that min-σ would merge; a merge's output is none of them.
function merged() {
  return SUBJECTS.filter(subject => subject.base !== null && subject.role !== 'output');
}

// What the view of min-σ can be of: task vectors, or where there are none the weights themselves.
function vectorSubjects() {
  return merged().length ? merged() : SUBJECTS;
}

// Whether min-σ has something to do; a merge is of task vectors, or the question does not arise.
function hasNoise() {
  return (DATA.merge ? merged() : vectorSubjects()).some(({ tensors }) =>
    tensors.some(each => each.std > 0));
}

// Returns for each tensor of a subject the least σ of all models, and how many models have it.
function thresholds(subject) {
  const others = merged().length ? merged() : [subject];
  const alone = others.length === 1;
  return subject.tensors.map(tensor => {
    const peers = others.map(other => other.byName.get(tensor.name)).filter(Boolean);
    return { sigma: Math.min(...peers.map(each => each.std)),
      num: alone ? state.count : peers.length };
  });
}

function drawMinSigma() {
  const subject = vectorSubjects()[state.vector], limits = thresholds(subject);
  const several = merged().length > 1;
  const { part } = currentTensor();
  byId('t-value').textContent = state.t.toFixed(1);
  byId('count').closest('label').hidden = several;
  byId('minsigma-text').textContent = minSigmaText(subject, several);
  const nums = limits.map(each => each.num);
  const shares = minSigmaShares(subject.tensors, limits.map(each => state.t * each.sigma), nums,
    GRID);
  const rows = [['elements', shares.count], ['Σ|δ|', shares.sum], ['Σδ²', shares.squares]];
  fillTable(byId('shares'), ['share of', 'kept whole', 'left in the average', 'averaged away'],
    rows.map(([name, found]) =>
      [name, percent(found.whole), percent(found.left), percent(found.away)]));
  drawThresholds(subject, limits);
  const limitOf = new Map(subject.tensors.map((each, i) => [each.name, limits[i]]));
  const share = tensor => 100 * (1 - inside(tensor, state.t * limitOf.get(tensor.name).sigma, GRID)
    .count / numFinite(tensor));
  const tensors = tensorsOf(subject, part);
  byId('outlier-plot').hidden = !hasDepth();
  if (hasDepth()) {
    plotLines(byId('outlier-plot'), linesOf(tensors, share), layersOf(tensors),
      `kept whole at t = ${state.t.toFixed(1)}, %`);
  }
}

// Whether a reader comes for min-σ and its paper: nothing was merged yet, or it was by this method.
function isOfMinSigma() {
  return !DATA.merge || DATA.merge.method === 'min_sigma';
}

// Says why min-σ is shown where something else was asked for.
function whyMinSigma() {
  if (DATA.merge?.method === 'min_sigma') return '';
  return DATA.merge ? `This merge is by ${DATA.merge.method}. For comparison, a preview of min-σ `
    + '(arXiv 2501.10661), which needs only these distributions: what it would keep of the same '
    + 'changes. ' : 'A preview of a merge by min-σ (arXiv 2501.10661), which needs only these '
    + 'distributions. ';
}

function minSigmaText(subject, several) {
  const what = subject.base === null
    ? 'Min-σ works on task vectors, which need a base; here is what it would do to the weights '
      + 'themselves. ' : '';
  const sigma = several
    ? `σ is the least of the ${merged().length} models' own, tensor by tensor. `
    : 'σ is this model’s own; in a merge it is the least of all models’, which keeps as much or '
      + 'more. ';
  return `${whyMinSigma()}${what}Changes beyond tσ are kept whole; those within are noise, divided by the number `
    + `of models. ${sigma}Taken from histograms of bins σ/32 wide.`;
}

function drawThresholds(subject, limits) {
  const ts = Array.from({ length: 41 }, (_, i) => 1 + i / 10);
  const total = subject.tensors.reduce((sum, each) => sum + numFinite(each), 0);
  subject.curve ??= ts.map(t => {
    const kept = total - subject.tensors.reduce((sum, each, i) =>
      sum + inside(each, t * limits[i].sigma, GRID).count, 0);
    return kept >= 1 ? 100 * kept / total : null;  // less than an element is rounding
  });
  const line = (name, y, style) => ({ name, x: ts, y, mode: 'lines', line: style,
    hovertemplate: `t = %{x:.1f}: %{y:.3g}%<extra>${name}</extra>` });
  const figure = layout(axis('t'), axis('elements kept whole, %', { type: 'log', dtick: 1 }), {
    shapes: [{ type: 'line', x0: state.t, x1: state.t, yref: 'paper', y0: 0, y1: 1,
      line: { color: colour('limit'), width: 1, dash: 'dash' } }],
  });
  show(byId('threshold-plot'), [
    line('weights', subject.curve, { color: colour('accent'), width: 2 }),
    line('Gaussian', ts.map(t => 200 * gaussianBelow(-t)), { color: colour('fit'), width: 1.5 }),
  ], figure, 'Share kept whole against t');
}
