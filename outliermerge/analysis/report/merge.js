'use strict';

// What a merge was asked for and recorded, and how far its output is from what went into it.

// Returns the lines of a number that a merge recorded, such as one a model.
function linesOfSeries(series) {
  return distinct(DATA.merge.tensors.flatMap(each => Object.keys(each.numbers[series] ?? {})));
}

function drawMerge() {
  const { merge } = DATA;
  byId('merge-text').textContent = `${actionsText()} Made by outliermerge ${merge.version}.`;
  byId('recipe').textContent = merge.recipe;
  drawModels();
  drawLayers();
  const series = Object.keys(merge.series);
  byId('recorded').hidden = series.length === 0;
  if (!series.length) return;
  const { part } = currentTensor();
  const inPart = merge.tensors.filter(each => each.part === part
    && each.numbers[state.series] !== undefined);
  const labels = distinct(inPart.map(each => each.label));
  const wanted = labels.includes(state.mergeModule) ? state.mergeModule
    : labels.includes(currentTensor().label) ? currentTensor().label : labels[0];
  fill(byId('merge-module'), labels.map(label => [label, label]), wanted);
  byId('series-text').textContent = merge.series[state.series];
  const tensors = inPart.filter(each => each.label === wanted);
  const lines = linesOfSeries(state.series).map((line, look) => ({
    ...(linesOf(tensors, tensor => tensor.numbers[state.series][line] ?? null)[0]
      ?? { points: [] }),
    name: line || state.series, look,
  }));
  plotLines(byId('merge-plot'), lines, layersOf(tensors), state.series,
    { nothing: 'Nothing was recorded of layers here.' });
}

function inputsText() {
  const titles = role => DATA.merge.inputs.filter(each => each.role === role)
    .map(each => each.title
      + (each.made_of.length ? ` (itself a merge of ${listed(each.made_of, 4)})` : ''));
  const base = titles('base').length ? ` on ${listed(titles('base'))}` : '';
  const others = DATA.merge.inputs.filter(each => !['base', 'model'].includes(each.role));
  const more = others.length
    ? ` Also read: ${listed(others.map(each => `${each.title} (${each.role})`))}.` : '';
  const paper = DATA.merge.paper ? ` (${DATA.merge.paper})` : '';
  if (DATA.merge.modules) {
    return `A merge of parts of ${listed(titles('base'))}: ${DATA.merge.modules}. `
      + `All else is the base’s.${more}`;
  }
  return `A merge by ${DATA.merge.method}${paper} of ${listed(titles('model'), 4)}${base}.${more}`;
}

const DONE = { merge: 'merged', copy: 'copied', compare: 'compared' };

function actionsText() {
  const num = DATA.merge.tensors.length;
  const done = Object.entries(DATA.merge.actions);
  if (!done.length) return '';
  const word = action => DONE[action] ?? action;
  if (done.length === 1) return `All ${shown(num)} tensors were ${word(done[0][0])}.`;
  return `Of ${shown(num)} tensors `
    + `${listed(done.map(([action, count]) => `${shown(count)} were ${word(action)}`))}.`;
}

// A row for each model: its own settings, and what was kept.
function drawModels() {
  const { by_model: settings, inputs } = DATA.merge;
  const titles = inputs.filter(each => each.role !== 'base').map(each => each.title);
  const columns = Object.keys(settings).filter(name =>
    titles.some(title => settings[name][title]));
  const text = value => String(Number(value.toPrecision(4)));
  const range = ([low, high]) => (low === high ? text(low) : `${text(low)} to ${text(high)}`);
  const rows = titles.map(title => [title, ...columns.map(name =>
    (settings[name][title] ? range(settings[name][title]) : '–'))]);
  const kept = DATA.drift?.has_base ? titles.map(title =>
    drift(DATA.drift.tensors, 'kept', DATA.drift.models.indexOf(title))) : [];
  const hasKept = kept.some(value => value !== null);
  if (hasKept) rows.forEach((row, i) => row.push(percent(kept[i], 1)));
  byId('merge-table').hidden = columns.length === 0 && !hasKept;
  byId('merge-table').caption.textContent = hasKept
    ? 'What was asked of each model, and what was kept of it' : 'What was asked of each model';
  fillTable(byId('merge-table'),
    ['model', ...columns, ...(hasKept ? ['kept of its change'] : [])], rows);
}

const NORM = '‖ ‖ the root of the sum of squares';
const SYMBOLS_OF_WEIGHTS = `W* is the output, Wᵢ a model that went into it, ${NORM}`;
const SYMBOLS_OF_CHANGES = `W₀ is the base, W* the output, Wᵢ a model, ΔW* = W* − W₀, ΔWᵢ = Wᵢ − W₀, ${NORM}`;

// Returns the measures that have a value: of models that are the base some have none. Of each its name,
// what it is in words, the heading of a column, and the formula.
function driftMeasures() {
  const { has_base: hasBase, tensors, models } = DATA.drift;
  const all = hasBase ? [
    ['kept', 'kept of the change', 'kept', '⟨ΔW*, ΔWᵢ⟩ / ‖ΔWᵢ‖²'],
    ['distance', 'distance from the model', 'distance', '‖W* − Wᵢ‖ / ‖ΔWᵢ‖'],
    ['cosine', 'cosine of the two changes', 'cosine', '⟨ΔW*, ΔWᵢ⟩ / (‖ΔW*‖ ‖ΔWᵢ‖)'],
    ['length', 'length beside the model’s change', 'length', '‖ΔW*‖ / ‖ΔWᵢ‖'],
    ['base', 'moved from the base', 'from the base', '‖ΔW*‖ / ‖W₀‖'],
  ] : [
    ['distance', 'distance from the model', 'distance', '‖W* − Wᵢ‖ / ‖Wᵢ‖'],
    ['cosine', 'cosine of the two', 'cosine', '⟨W*, Wᵢ⟩ / (‖W*‖ ‖Wᵢ‖)'],
    ['length', 'length beside the model', 'length', '‖W*‖ / ‖Wᵢ‖'],
  ];
  return all.filter(([measure]) =>
    models.some((_, model) => drift(tensors, measure, model) !== null));
}

function drawDrift() {
  const names = DATA.drift.models, measures = driftMeasures(), all = DATA.drift.tensors;
  byId('drift-text').textContent = DATA.drift.has_base
    ? 'How near the output is to each model, by their changes from the base. Kept: how much of the '
      + 'model’s change the output has. Distance: 0 is the model itself, 1 is as far from it as the '
      + 'base. Cosine: 1 where both changed in the same direction. Length: how large the output’s '
      + 'change is beside the model’s; from the base: beside the base’s own size.'
    : 'How near the output is to each model that went into it. Distance: 0 is the model itself. '
      + 'Cosine: 1 where both have the same direction. Length: how large the output is beside the model.';
  byId('drift-symbols').textContent =
    `${DATA.drift.has_base ? SYMBOLS_OF_CHANGES : SYMBOLS_OF_WEIGHTS}.`;
  byId('drift-formulas').replaceChildren(...measures.map(([, , heading, formula]) => {
    const pair = element('div');
    pair.append(element('dt', heading), element('dd', formula));
    return pair;
  }));
  byId('drift-table').caption.textContent = 'All tensors together';
  fillTable(byId('drift-table'), ['model', ...measures.map(each => each[2])],
    names.map((name, model) =>
      [name, ...measures.map(([measure]) => shown(drift(all, measure, model)))]));
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
  byId('drift-depth-plot').hidden = layers.length < 2;
  if (layers.length > 1) drawDriftDepth(tensors, layers, title, names);
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
