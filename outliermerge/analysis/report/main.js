'use strict';

// The state of the page, its controls, and when what is drawn.

const state = {
  subject: firstSubject(), tensor: null, vectors: false, log: false, gallery: 'layer', picture: 'density',
  depthModule: '', depthScale: 'zero', statistic: 'std', vector: 0, t: DATA.t, count: 2,
  series: Object.keys(DATA.merge?.series ?? {})[0], mergeModule: '',
  driftMeasure: DATA.drift && driftMeasures()[0]?.[0],
  driftModel: 0, table: 'model', sorted: null, ascending: true, filter: '', allRows: false,
};

// A section is drawn again when what it depends on changed and it is in sight.
const OF_TENSOR = ['subject', 'tensor', 'vectors'];
const SECTIONS = {
  merge: [drawMerge, ['tensor', 'series', 'mergeModule']],
  drift: [drawDrift, [...OF_TENSOR, 'driftMeasure', 'driftModel']],
  distribution: [drawDistribution, ['subject', 'tensor', 'log']],
  gallery: [drawGallery, [...OF_TENSOR, 'log', 'gallery', 'picture']],
  depth: [drawDepth, [...OF_TENSOR, 'depthModule', 'depthScale']],
  heat: [drawHeat, [...OF_TENSOR, 'statistic']],
  minsigma: [drawMinSigma, ['tensor', 'vectors', 'vector', 't', 'count']],
  tables: [drawTable, ['subject', 'table', 'sorted', 'ascending', 'filter', 'allRows']],
};
// A section that would be empty is not there.
const HAS = { merge: DATA.merge, drift: DATA.drift && driftMeasures().length,
  depth: hasDepth(), minsigma: hasNoise() };
for (const [name, has] of Object.entries(HAS)) {
  if (has) continue;
  delete SECTIONS[name];
  byId(name).hidden = true;
  document.querySelector(`nav a[href="#${name}"]`).hidden = true;
}

const stale = new Set(), inSight = new Set();

function markStale(name) {
  stale.add(name);
  byId(name).setAttribute('aria-busy', 'true');
}

function drawStale() {
  if (!window.Plotly) return;  // it is drawn as soon as that is there
  drawLater();
  for (const name of [...stale]) {
    if (!inSight.has(name)) continue;
    draw(name);
  }
}

const whenIdle = window.requestIdleCallback
  ? work => window.requestIdleCallback(work, { timeout: 1000 }) : work => setTimeout(work, 50);
let isAsked = false;

// Draws what is out of sight, piece by piece, when the browser has nothing else to do. So a page
// that is photographed whole is complete, and scrolling waits for nothing.
function drawLater() {
  if (isAsked) return;
  isAsked = true;
  whenIdle(() => {
    isAsked = false;
    const [name] = stale;
    if (!name && !drawPictures(1)) return;
    drawLater();  // first, so that a section that cannot be drawn holds up no other
    if (name) draw(name);
  });
}

// A section that is folded is drawn when it is opened: nothing in it has a size before.
function draw(name) {
  stale.delete(name);
  try {
    if (foldOf(name)?.open !== false) SECTIONS[name][0]();
  } finally {
    byId(name).setAttribute('aria-busy', 'false');
  }
  showCues();
}

function foldOf(name) {
  return document.querySelector(`#${name} > .fold`);
}

function connectFolds() {
  for (const name of Object.keys(SECTIONS)) {
    const fold = foldOf(name);
    if (!fold) continue;
    fold.open = isOfMinSigma();
    fold.addEventListener('toggle', () => {
      if (!fold.open) return;
      markStale(name);
      drawStale();
    });
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
  if (isFar) goTo('distribution');
}

// What leaves no choice is hidden.
function fill(chooser, options, chosen) {
  chooser.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  chooser.value = String(chosen);
  chooser.closest('label').hidden = options.length < 2;
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
  fill(byId('subject'), SUBJECTS.map((each, i) => [i, subjectTitle(each)]),
    state.subject);
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
  onRadio('depth-scale', value => ({ depthScale: value }));
  onChange('statistic', target => ({ statistic: target.value }));
  onChange('t', target => ({ t: Number(target.value) }));
  onChange('vector', target => ({ vector: Number(target.value) }));
  onChange('count', target => ({ count: Number(target.value) }));
  onChange('table', target => ({ table: target.value, sorted: null, allRows: false }));
  onChange('filter', target => ({ filter: target.value }));
  byId('all-rows').addEventListener('click', () => update({ allRows: true }));
  if (DATA.merge) {
    fill(byId('series'), Object.keys(DATA.merge.series).map(key => [key, key]), state.series);
    onChange('series', target => ({ series: target.value }));
    onChange('merge-module', target => ({ mergeModule: target.value }));
  }
  if (DATA.drift) {
    fill(byId('drift-measure'), driftMeasures(), state.driftMeasure);
    fill(byId('drift-model'), DATA.drift.models.map((name, i) => [i, name]), 0);
    onChange('drift-measure', target => ({ driftMeasure: target.value }));
    onChange('drift-model', target => ({ driftModel: Number(target.value) }));
  }
}

// Who names a base wants to see the changes. Where nothing changed, there are only the weights.
function firstSubject() {
  return Math.max(0, SUBJECTS.findIndex(({ base, tensors }) =>
    base !== null && tensors.some(each => each.std > 0)));
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
    themeOfScreen = event.matches ? 'dark' : 'light';
    if (isPrinted()) return;  // paper stays light
    setTheme(themeOfScreen);
    redrawAll();
  });
  byId('theme').addEventListener('click', () => {
    setTheme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark');
    redrawAll();
  });
}

// A printed page is drawn whole, in light colours and as wide as paper; `page.css` has that width.
let themeOfScreen, openedForPaper = [];

function isPrinted() {
  return document.documentElement.classList.contains('printed');
}

function connectPrinting() {
  window.addEventListener('beforeprint', () => {
    if (isPrinted()) return;
    themeOfScreen = document.documentElement.dataset.theme;
    document.documentElement.classList.add('printed');
    setTheme('light');
    openedForPaper = [...document.querySelectorAll('.printed-open:not([open])')];
    for (const each of openedForPaper) each.open = true;
    forgetPlots();
    for (const name of Object.keys(SECTIONS)) draw(name);
    drawPictures(Infinity);
  });
  window.addEventListener('afterprint', () => {
    document.documentElement.classList.remove('printed');
    setTheme(themeOfScreen);
    for (const each of openedForPaper) each.open = false;
    forgetPlots();
    redrawAll();
  });
}

// A plot that is drawn again keeps its width; a new one is as wide as its place.
function forgetPlots() {
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    Plotly.purge(plot);
    delete plot.dataset.bound;
  }
}

// Draws what is above a section first, so that the section stays where a link has led.
function goTo(name) {
  const fold = SECTIONS[name] && foldOf(name);
  if (fold && !fold.open) {
    fold.open = true;
    markStale(name);
  }
  for (const each of Object.keys(SECTIONS)) {
    if (stale.has(each)) draw(each);
    if (each === name) break;
  }
  const section = byId(name);
  if (!section) return;
  section.scrollIntoView();
  const again = new ResizeObserver(() => section.scrollIntoView());  // plots above it grow when they are laid out
  again.observe(document.body);
  const stop = () => again.disconnect();
  setTimeout(stop, 1000);
  for (const act of ['wheel', 'pointerdown', 'keydown']) window.addEventListener(act, stop, { once: true, passive: true });
}

// Marks the section that is read in the bar of links, which stays in sight.
function markSection() {
  const top = document.documentElement.scrollTop
    + parseFloat(getComputedStyle(document.documentElement).scrollPaddingTop) + 2;
  let here = Object.keys(SECTIONS).findLast(name => byId(name).offsetTop <= top);
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  if (here && scrollTop + clientHeight >= scrollHeight - 2) {  // the last ones cannot get further up
    const linked = location.hash.slice(1), inView = Object.keys(SECTIONS);
    inView.splice(0, inView.indexOf(here));
    here = inView.includes(linked) ? linked : inView.at(-1);
  }
  for (const link of document.querySelectorAll('nav a')) {
    const isHere = link.hash === `#${here}`;
    if (isHere === link.hasAttribute('aria-current')) continue;
    if (isHere) link.setAttribute('aria-current', 'true');
    else link.removeAttribute('aria-current');
  }
}

function connectLinks() {
  const bar = byId('top');
  const measure = () => {
    const stuck = isNarrow() ? bar.querySelector('nav') : bar;
    document.documentElement.style.scrollPaddingTop = `${stuck.offsetHeight - 2}px`;  // its rule covers the section’s
    markSection();
  };
  new ResizeObserver(measure).observe(bar);
  measure();
  for (const link of document.querySelectorAll('nav a')) {
    link.addEventListener('click', () => goTo(link.hash.slice(1)));
  }
  window.addEventListener('scroll', () => requestAnimationFrame(markSection), { passive: true });
  window.addEventListener('hashchange', () => goTo(location.hash.slice(1)));
  if (location.hash) goTo(location.hash.slice(1));
}

// A table that goes on to the right fades there, and can be scrolled by keys.
function showCues() {
  for (const box of document.querySelectorAll('.scroll')) {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    const isWide = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle('more', rest > 1);
    if (isWide || box.scrollHeight > box.clientHeight + 1) box.tabIndex = 0;
    else box.removeAttribute('tabindex');
    box.setAttribute('role', 'group');
    box.setAttribute('aria-label', `Table: ${box.querySelector('caption').textContent}`);
  }
}

function connectCues() {
  for (const box of document.querySelectorAll('.scroll')) {
    const cue = element('p', 'Scroll sideways for more columns →');
    cue.className = 'cue';
    box.before(cue);
    box.addEventListener('scroll', showCues, { passive: true });
  }
  window.addEventListener('resize', showCues);
}

connectTheme();
showLead();
state.tensor = firstTensor(SUBJECTS[state.subject]);
connectControls();
fillChoosers();
byId('vectors').closest('label').hidden = SUBJECTS.every(({ tensors }) =>
  tensors.every(each => each.is_matrix));
byId('minsigma-title').textContent = DATA.merge?.method === 'min_sigma' ? 'What min-σ keeps'
  : 'What min-σ would keep';
connectCues();
connectFolds();
for (const name of Object.keys(SECTIONS)) markStale(name);

function start() {
  for (const name of Object.keys(SECTIONS)) sectionObserver.observe(byId(name));
  connectLinks();
  connectPrinting();
  drawStale();  // the observer's first report can be late where the browser paints nothing
  // A turned phone changes which way heat maps lie, and where their scales of colours are: Plotly keeps
  // the room of the old scale in a plot that is drawn again.
  let wasNarrow = isNarrow();
  window.addEventListener('resize', () => {
    if (isNarrow() === wasNarrow) return;
    wasNarrow = isNarrow();
    forgetPlots();
    redrawAll();
  });
}

const endLoading = keepLoading();
loadPlotly().then(start, error => {
  byId('notes').hidden = false;
  byId('notes').append(element('li', `This browser cannot draw the figures: ${error.message}. Chrome `
    + '80, Firefox 113, Safari 16.4 and later ones can.'));
}).finally(endLoading);
