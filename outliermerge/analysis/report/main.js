'use strict';

// The state of the page, its controls, and when what is drawn.

const state = {
  subject: 0, tensor: null, vectors: false, log: false, gallery: 'layer', picture: 'density',
  depthModule: '', depthLog: false, statistic: 'std', vector: 0, t: DATA.t, count: 2,
  mergeStatistic: DATA.merge?.statistics[0], mergeModule: '', driftMeasure: 'distance',
  driftModel: 0, table: 'model', sorted: null, ascending: true, filter: '', allRows: false,
};

// A section is drawn again when what it depends on changed and it is in sight.
const OF_TENSOR = ['subject', 'tensor', 'vectors'];
const SECTIONS = {
  distribution: [drawDistribution, ['subject', 'tensor', 'log']],
  gallery: [drawGallery, [...OF_TENSOR, 'log', 'gallery', 'picture']],
  depth: [drawDepth, [...OF_TENSOR, 'depthModule', 'depthLog']],
  heat: [drawHeat, [...OF_TENSOR, 'statistic']],
  minsigma: [drawMinSigma, ['tensor', 'vectors', 'vector', 't', 'count']],
  merge: [drawMerge, ['tensor', 'mergeStatistic', 'mergeModule']],
  drift: [drawDrift, [...OF_TENSOR, 'driftMeasure', 'driftModel']],
  tables: [drawTable, ['subject', 'table', 'sorted', 'ascending', 'filter', 'allRows']],
};
if (!DATA.merge) delete SECTIONS.merge;
if (!DATA.drift) delete SECTIONS.drift;

const stale = new Set(), inSight = new Set();

function markStale(name) {
  stale.add(name);
  byId(name).setAttribute('aria-busy', 'true');
}

function drawStale() {
  for (const name of [...stale]) {
    if (!inSight.has(name)) continue;
    stale.delete(name);
    SECTIONS[name][0]();
    byId(name).setAttribute('aria-busy', 'false');
  }
}

const sectionObserver = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) inSight.add(target.id);
    else inSight.delete(target.id);
  }
  drawStale();
}, { rootMargin: '100px' });

function update(changes) {
  const changed = Object.keys(changes).filter(key => state[key] !== changes[key]);
  Object.assign(state, changes);
  for (const [name, [, depends]] of Object.entries(SECTIONS)) {
    if (depends.some(key => changed.includes(key))) markStale(name);
  }
  if (changed.some(key => OF_TENSOR.includes(key))) fillChoosers();
  drawStale();
}

function redrawAll() {
  for (const name of Object.keys(SECTIONS)) markStale(name);
  drawStale();
}

function select(name, isFar = false) {
  update({ tensor: name });
  if (isFar) byId('distribution').scrollIntoView();
}

function fill(chooser, options, chosen) {
  chooser.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  chooser.value = String(chosen);
}

// Returns the tensor nearest to what was chosen: the part counts most, then the other two.
function nearest(wanted, first) {
  const tensors = SUBJECTS[state.subject].tensors;
  const current = currentTensor() ?? wanted;
  const score = each => ['part', 'layer', 'label'].reduce((sum, key) => {
    const weight = key === first ? 8 : key === 'part' ? 4 : 1;
    return sum + (each[key] === (wanted[key] ?? current[key]) ? weight : 0);
  }, each.is_matrix ? 0.5 : 0);
  return tensors.reduce((best, each) => (score(each) > score(best) ? each : best));
}

function fillChoosers() {
  const { tensors } = SUBJECTS[state.subject], tensor = currentTensor();
  const inPart = tensorsOf(SUBJECTS[state.subject], tensor.part);
  fill(byId('part'), distinct(tensors.map(each => each.part)).map(part => [part, partName(part)]),
    tensor.part);
  const byDepth = [...inPart].sort((a, b) => a.depth - b.depth);
  fill(byId('layer'), distinct(byDepth.map(each => each.layer)).map(layer => [layer, layer || '–']),
    tensor.layer);
  const labels = distinct(inPart.map(each => each.label));
  fill(byId('module'), labels.map(label => [label, label]), tensor.label);
  const members = inPart.filter(each => each.layer === tensor.layer && each.label === tensor.label);
  byId('member-label').hidden = members.length < 2;
  fill(byId('member'), members.map(each => [each.name, each.name]), tensor.name);
  if (!labels.includes(state.depthModule)) state.depthModule = '';
  fill(byId('depth-module'), [['', 'all'], ...labels.map(label => [label, label])],
    state.depthModule);
}

function onChange(id, changes) {
  byId(id).addEventListener('input', event => update(changes(event.target)));
}

function onRadio(name, changes) {
  for (const radio of document.querySelectorAll(`input[name="${name}"]`)) {
    radio.addEventListener('change', () => update(changes(radio.value)));
  }
}

function connectControls() {
  fill(byId('subject'), SUBJECTS.map((each, i) => [i, subjectTitle(each)]), 0);
  fill(byId('statistic'), Object.entries(DATA.statistics), state.statistic);
  fill(byId('vector'), vectorSubjects().map((each, i) => [i, subjectTitle(each)]), 0);
  fill(byId('count'), [1, 2, 3, 4, 5, 6, 7, 8].map(num => [num, num]), state.count);
  fill(byId('table'), Object.entries(TABLES).map(([key, [title]]) => [key, title]), state.table);
  byId('t').value = String(state.t);
  byId('subject').addEventListener('input', event => {
    const subject = Number(event.target.value);
    const hasIt = SUBJECTS[subject].byName.has(state.tensor);
    update({ subject, ...(hasIt ? {} : { tensor: firstTensor(SUBJECTS[subject]) }) });
  });
  for (const [id, key] of [['part', 'part'], ['layer', 'layer'], ['module', 'label']]) {
    byId(id).addEventListener('input', event =>
      select(nearest({ [key]: event.target.value }, key).name));
  }
  onChange('member', target => ({ tensor: target.value }));
  onChange('vectors', target => ({ vectors: target.checked }));
  onRadio('scale', value => ({ log: value === 'log' }));
  onRadio('gallery', value => ({ gallery: value }));
  onRadio('picture', value => ({ picture: value }));
  onChange('depth-module', target => ({ depthModule: target.value }));
  onRadio('depth-scale', value => ({ depthLog: value === 'log' }));
  onChange('statistic', target => ({ statistic: target.value }));
  onChange('t', target => ({ t: Number(target.value) }));
  onChange('vector', target => ({ vector: Number(target.value) }));
  onChange('count', target => ({ count: Number(target.value) }));
  onChange('table', target => ({ table: target.value, sorted: null, allRows: false }));
  onChange('filter', target => ({ filter: target.value }));
  byId('all-rows').addEventListener('click', () => update({ allRows: true }));
  if (DATA.merge) {
    fill(byId('merge-statistic'), DATA.merge.statistics.map(key => [key, key]),
      state.mergeStatistic);
    onChange('merge-statistic', target => ({ mergeStatistic: target.value }));
    onChange('merge-module', target => ({ mergeModule: target.value }));
  }
  if (DATA.drift) {
    fill(byId('drift-measure'), driftMeasures(), state.driftMeasure);
    fill(byId('drift-model'), DATA.drift.models.map((name, i) => [i, name]), 0);
    onChange('drift-measure', target => ({ driftMeasure: target.value }));
    onChange('drift-model', target => ({ driftModel: Number(target.value) }));
  }
}

// The part with most elements is what people come for: a model's layers, not its embeddings.
function firstTensor({ tensors }) {
  const sizes = new Map();
  for (const each of tensors) {
    if (each.depth === null || !each.is_matrix) continue;
    sizes.set(each.part, (sizes.get(each.part) ?? 0) + each.num_elements);
  }
  const [part] = [...sizes].sort((a, b) => b[1] - a[1])[0] ?? [null];
  return (tensors.find(each => each.part === part && each.is_matrix)
    ?? tensors.find(each => each.is_matrix) ?? tensors[0]).name;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId('theme').textContent = theme === 'dark' ? 'Light' : 'Dark';
  byId('theme').setAttribute('aria-label', `${byId('theme').textContent} theme`);
}

function connectTheme() {
  const system = window.matchMedia('(prefers-color-scheme: dark)');
  setTheme(system.matches ? 'dark' : 'light');
  system.addEventListener('change', event => {
    setTheme(event.matches ? 'dark' : 'light');
    redrawAll();
  });
  byId('theme').addEventListener('click', () => {
    setTheme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark');
    redrawAll();
  });
}

function showHead() {
  const subject = SUBJECTS[0], matrices = subject.tensors.filter(each => each.is_matrix).length;
  const total = subject.tensors.reduce((sum, each) => sum + each.num_elements, 0);
  const bases = distinct(SUBJECTS.map(each => each.base).filter(each => each !== null));
  byId('summary').textContent = `${shown(total)} elements in ${shown(subject.tensors.length)} `
    + `tensors, ${shown(matrices)} of them matrices`
    + (bases.length ? `; ΔW against ${bases.join(', ')}` : '');
  const notes = distinct([...DATA.notes, ...SUBJECTS.flatMap(each => each.notes)]);
  byId('notes').hidden = notes.length === 0;
  byId('notes').replaceChildren(...notes.map(note => element('li', note)));
  for (const name of ['merge', 'drift']) {
    for (const each of document.querySelectorAll(`.${name}`)) each.hidden = !DATA[name];
  }
}

connectTheme();
showHead();
state.tensor = firstTensor(SUBJECTS[0]);
connectControls();
fillChoosers();
for (const name of Object.keys(SECTIONS)) {
  markStale(name);
  sectionObserver.observe(byId(name));
}
// A turned phone changes which way heat maps lie.
let wasNarrow = isNarrow();
window.addEventListener('resize', () => {
  if (isNarrow() !== wasNarrow) redrawAll();
  wasNarrow = isNarrow();
});
