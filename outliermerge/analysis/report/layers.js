'use strict';

// Where the layers of a merge and of its stages are from: a strip for each stack of layers.

const MAX_STRIPS = 16, NUM_LOOKS = 7;

const lookOf = (models, model) => models.indexOf(model) % NUM_LOOKS + 1;

function rangeText([start, stop]) {
  return stop - start === 1 ? String(start) : `${start}–${stop - 1}`;
}

function sourcesText(row) {
  return listed(row.sources.map(each => `${each.model} ${rangeText(each.layer_range)}`));
}

function drawLayers() {
  const rows = DATA.merge.layer_map;
  byId('layers').hidden = !rows.length;
  if (!rows.length) return;
  const models = distinct(rows.flatMap(row => row.sources.map(each => each.model)));
  byId('layers-models').replaceChildren(...models.map(model => {
    const item = element('li', model);
    item.style.setProperty('--look', `var(--line-${lookOf(models, model)})`);
    return item;
  }));
  const strips = new Map();
  for (const row of rows) {
    const name = `${row.of}, ${row.stack}`;
    strips.set(name, [...strips.get(name) ?? [], row]);
  }
  const most = Math.max(...rows.map(row => row.layers[1]));
  const drawn = [...strips].slice(0, MAX_STRIPS)
    .map(([name, own]) => stripOf(name, own, models, most));
  if (strips.size > drawn.length) {
    drawn.push(element('p', `${strips.size - drawn.length} more are in the table.`));
  }
  byId('layers-map').replaceChildren(...drawn);
  byId('layers-table').caption.textContent = 'Layers, and the layers of models that they are from';
  fillTable(byId('layers-table'), ['of', 'stack', 'layers', 'merged by', 'from'],
    rows.map(row => [row.of, row.stack, rangeText(row.layers),
      row.method === 'copy' ? 'copied' : row.method, sourcesText(row)]));
}

// A strip has a block for each row, as long as its layers, with a band for each model.
function stripOf(name, rows, models, most) {
  const figure = element('figure', ''), strip = element('div', '');
  const caption = element('figcaption', name);
  strip.className = 'strip';
  strip.style.gridTemplateColumns = `repeat(${most}, minmax(0, 1fr))`;
  strip.setAttribute('role', 'img');
  strip.setAttribute('aria-label', `${name}: ${rows.map(row =>
    `${rangeText(row.layers)} from ${sourcesText(row)}`).join('; ')}`);
  for (const row of rows) {
    const block = element('div', rangeText(row.layers));
    block.append(element('span', sourcesText(row)));
    block.title = `${rangeText(row.layers)}: ${row.method === 'copy' ? 'copied' : row.method} of `
      + sourcesText(row);
    block.style.gridColumn = `${row.layers[0] + 1} / ${row.layers[1] + 1}`;
    const bands = row.sources.map(each => `var(--line-${lookOf(models, each.model)})`);
    block.style.backgroundImage = `linear-gradient(to bottom, ${bands.map((band, i) =>
      `${band} ${100 * i / bands.length}% ${100 * (i + 1) / bands.length}%`).join(', ')})`;
    strip.append(block);
  }
  figure.append(caption, strip);
  return figure;
}
