'use strict';

// Draws with Plotly; colours come from the style sheet so that figures follow the theme.

// A plot of more lines than these shows the first, and the others on demand.
const MAX_LINES = 7;
// Colours are `--line-1` to `--line-7` of the style sheet; symbols tell lines apart without them.
const SYMBOLS = ['circle', 'square-open', 'diamond-open', 'triangle-up-open', 'x-open', 'star-open',
  'triangle-down-open'];
const DASHES = ['solid', '8px,8px', '2px,5px', '12px,4px,2px,4px', '5px,5px', '14px,6px', '2px,3px'];
// A finger that draws a box cannot scroll the page, and buttons would cover a small plot.
const IS_TOUCHED = window.matchMedia('(pointer: coarse)').matches;
const CONFIG = {
  responsive: true,
  displaylogo: false,
  displayModeBar: IS_TOUCHED ? false : 'hover',
  modeBarButtonsToRemove: ['select2d', 'lasso2d', 'autoScale2d'],
};

// Runs plotly.js, which the page holds packed, as a script of its own.
async function loadPlotly() {
  const held = document.getElementById('plotly');
  const packed = Uint8Array.from(atob(held.textContent), each => each.charCodeAt(0));
  const script = document.createElement('script');
  script.textContent = await new Response(
    new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  held.replaceWith(script);
}

// Lets the page count as loading, as a frame in it does; returns what ends that. So what prints a page
// once it is loaded, such as Chromium's --print-to-pdf, finds it with its figures.
function keepLoading() {
  const frame = document.createElement('iframe');
  frame.hidden = true;
  document.body.append(frame);
  frame.contentDocument.open();
  return () => {
    frame.contentDocument.close();
    frame.remove();
  };
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function lineColour(look) {
  return colour(`line-${look % MAX_LINES + 1}`);
}

function isNarrow() {
  return window.innerWidth < 704;
}

function axis(title, extra = {}) {
  return {
    title: { text: title, standoff: 8 },
    gridcolor: colour('grid'),
    linecolor: colour('line'),
    zerolinecolor: colour('line'),
    automargin: true,
    exponentformat: 'e',
    minexponent: 4,
    ...extra,
  };
}

function layout(xaxis, yaxis, extra = {}) {
  return {
    paper_bgcolor: 'rgba(0,0,0,0)',
    plot_bgcolor: 'rgba(0,0,0,0)',
    font: {
      family: 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif',
      size: isNarrow() ? 11 : 12,
      color: colour('ink'),
    },
    margin: { l: 52, r: 12, t: 28, b: 44 },
    hoverlabel: { bgcolor: colour('card'), bordercolor: colour('line'),
      font: { color: colour('ink') } },
    legend: { orientation: 'h', x: 0, xanchor: 'left', y: 1.02, yanchor: 'bottom',
      font: { size: 11 } },
    dragmode: IS_TOUCHED ? false : 'zoom',
    xaxis,
    yaxis,
    ...extra,
  };
}

function show(element, traces, figure, label) {
  element.classList.remove('empty');
  if (!element.classList.contains('js-plotly-plot')) element.textContent = '';
  element.setAttribute('aria-label', label);
  const drawn = Plotly.react(element, traces, figure, CONFIG);
  // The label says what the picture shows; its ticks, read one by one, would not.
  for (const picture of element.querySelectorAll('.main-svg')) {
    picture.setAttribute('aria-hidden', 'true');
  }
  return drawn;
}

function showNothing(element, text) {
  if (element.classList.contains('js-plotly-plot')) Plotly.purge(element);
  element.classList.add('empty');
  element.setAttribute('aria-label', text);
  element.textContent = text;
}

function limitLines(tensor, labelled) {
  const lines = [-3, -2, 2, 3].map(sigmas => ({
    type: 'line', yref: 'paper', y0: 0, y1: 1, layer: 'above',
    x0: tensor.mean + sigmas * tensor.std, x1: tensor.mean + sigmas * tensor.std,
    line: { color: colour('limit'), width: 1, dash: Math.abs(sigmas) === 2 ? 'dash' : 'dot' },
  }));
  const names = labelled ? [-3, -2, 2, 3].map(sigmas => ({
    x: tensor.mean + sigmas * tensor.std, y: 1, yref: 'paper', yanchor: 'bottom',
    text: `${sigmas < 0 ? '−' : ''}${Math.abs(sigmas)}σ`, showarrow: false,
    font: { size: 10, color: colour('soft') },
  })) : [];
  return { shapes: lines, annotations: names };
}

function densityTraces(tensor, grid, minJoined) {
  const { z, density, one } = densities(tensor, grid, minJoined);
  const toX = each => tensor.mean + each * tensor.std;
  // A log axis has no zero: empty bins lie below what one element would give.
  const floor = one / 4 / tensor.std;
  const fitted = Array.from({ length: 161 }, (_, i) => (i - 80) / 10);
  return {
    floor,
    peak: Math.max(...density, 0.4) / tensor.std,
    traces: [
      {
        name: 'elements', x: z.map(toX), y: density.map(d => Math.max(d / tensor.std, floor)),
        mode: 'lines', fill: 'tozeroy', fillcolor: colour('fill'),
        line: { shape: 'hvh', width: 0, color: colour('fill') },
        hovertemplate: '%{x:.4g}: %{y:.4g}<extra>elements</extra>',
      },
      {
        name: 'Gaussian', x: fitted.map(toX), y: fitted.map(each => gaussian(each) / tensor.std),
        mode: 'lines', line: { color: colour('fit'), width: 1.5 },
        hovertemplate: '%{x:.4g}: %{y:.4g}<extra>Gaussian</extra>',
      },
    ],
  };
}

// On a linear axis nothing is to be seen beyond 5σ; a log axis shows all that is stored.
function densityAxes(tensor, found, isLog, extra) {
  const reach = isLog ? Math.min(8, Math.max(4.2, 1.05 * Math.max(
    (tensor.maximum - tensor.mean) / tensor.std, (tensor.mean - tensor.minimum) / tensor.std))) : 5;
  const y = isLog
    ? { type: 'log', range: [Math.log10(found.floor * 2), Math.log10(found.peak * 2)], dtick: 1 }
    : { range: [0, found.peak * 1.08] };
  return [
    { range: [tensor.mean - reach * tensor.std, tensor.mean + reach * tensor.std], ...extra },
    { ...y, ...extra },
  ];
}

function plotDensity(element, tensor, grid, isLog, what) {
  if (!tensor.histogram) return showNothing(element, `All elements are ${shown(tensor.mean)}.`);
  const found = densityTraces(tensor, grid, 1);
  const [x, y] = densityAxes(tensor, found, isLog, {});
  const figure = layout(axis(what, { ...x, showgrid: false }), axis('density', y), {
    ...limitLines(tensor, true), showlegend: true,
  });
  figure.margin.t = 46;
  figure.legend.y = 1.07;
  return show(element, found.traces, figure, `Density of ${tensor.name}: mean `
    + `${shown(tensor.mean)}, σ ${shown(tensor.std)}, kurtosis ${shown(tensor.kurtosis_before)}`);
}

function qqTraces(tensor, grid) {
  const pairs = quantilePairs(tensor, grid);
  return [
    { x: [-5, 5], y: [-5, 5], mode: 'lines', line: { color: colour('fit'), width: 1.5 },
      hoverinfo: 'skip' },
    { x: pairs.gaussian, y: pairs.own, mode: 'markers',
      marker: { color: colour('accent'), size: 4 },
      hovertemplate: 'Gaussian %{x:.3f}σ, elements %{y:.3f}σ<extra></extra>' },
  ];
}

function plotQq(element, tensor, grid) {
  if (!tensor.histogram) return showNothing(element, 'No quantiles: all elements are equal.');
  const figure = layout(axis('Gaussian quantile, σ', { range: [-4.8, 4.8], dtick: 2, tick0: 0 }),
    axis('quantile of the elements, σ', { rangemode: 'tozero' }), { showlegend: false });
  return show(element, qqTraces(tensor, grid), figure,
    `Quantiles of ${tensor.name} against those of a Gaussian`);
}

// Small multiples have no axes' names, buttons or hovering: they are there to be compared.
function plotSmall(element, tensor, grid, picture, isLog) {
  if (!tensor.histogram) return showNothing(element, 'all equal');
  const bare = { showticklabels: false, showgrid: false, zeroline: false, fixedrange: true };
  const found = picture === 'qq'
    ? { traces: qqTraces(tensor, grid), axes: [{ range: [-4.8, 4.8], ...bare }, bare] }
    : densityTraces(tensor, grid, 4);
  const [x, y] = found.axes ?? densityAxes(tensor, found, isLog, bare);
  const figure = layout(axis('', x), axis('', y), {
    showlegend: false, margin: { l: 4, r: 4, t: 4, b: 4 },
    ...(picture === 'qq' ? {} : limitLines(tensor, false)),
  });
  for (const trace of found.traces) if (trace.mode === 'markers') trace.marker.size = 2.5;
  return Plotly.react(element, found.traces, figure, { staticPlot: true, responsive: true });
}

const withAllLines = new Set();  // the plots of which more than seven lines are shown

// Offers the lines that a plot leaves out, below it.
function offerLines(element, num, redraw) {
  let button = element.nextElementSibling;
  if (!button?.classList.contains('more-lines')) {
    button = document.createElement('button');
    button.type = 'button';
    button.className = 'more-lines';
    element.after(button);
  }
  button.hidden = num <= MAX_LINES;
  const isAll = withAllLines.has(element);
  button.textContent = isAll ? `Show ${MAX_LINES} of ${num} lines` : `Show all ${num} lines`;
  button.onclick = () => {
    if (isAll) withAllLines.delete(element);
    else withAllLines.add(element);
    redraw();
  };
}

// Returns what a line shows, for those who cannot see it.
function spoken({ name, points }) {
  const values = points.map(point => point[1]).filter(value => value !== null);
  if (!values.length) return `${name}: no values`;
  return `${name}: ${shown(values[0])} to ${shown(values.at(-1))}, `
    + `from ${shown(Math.min(...values))} up to ${shown(Math.max(...values))}`;
}

// Linear axes start at 0 unless a reader looks closer, so that noise does not look like a finding.
function valueAxis(title, values, scale) {
  if (scale === 'log') {
    const range = logRange(values);
    // Two digits of each decade, or a narrow range would have few ticks.
    return axis(title, { type: 'log', range, dtick: range[1] - range[0] > 2 ? 1 : 'D2' });
  }
  return axis(title, { rangemode: scale === 'close' ? 'normal' : 'tozero' });
}

// lines: [{name, look, points: [[depth, value, hover text]…]}]; look numbers colour and symbol.
function plotLines(element, lines, labels, yTitle, options = {}) {
  offerLines(element, lines.length, () => plotLines(element, lines, labels, yTitle, options));
  if (!lines.some(line => line.points.some(point => point[1] !== null))) {
    return showNothing(element, options.nothing ?? 'There are no layers to draw.');
  }
  const drawn = withAllLines.has(element) ? lines : lines.slice(0, MAX_LINES);
  const traces = drawn.map(({ name, look, points }) => ({
    name,
    x: points.map(point => point[0]),
    y: points.map(point => point[1]),
    text: points.map(point => point[2]),
    hovertemplate: '%{text}: %{y:.4g}<extra></extra>',
    mode: 'lines+markers',
    // Where a line lies on another, the other is seen through its gaps and its hollow marks.
    line: { color: lineColour(look), width: 2, dash: DASHES[look % DASHES.length] },
    marker: { size: look ? 7 : 6, symbol: SYMBOLS[look % SYMBOLS.length] },
  }));
  const step = Math.max(1, Math.ceil(labels.length / (isNarrow() ? 8 : 20)));
  const ticks = labels.map((_, i) => i).filter(i => i % step === 0);
  const figure = layout(
    axis('layer', { tickvals: ticks, ticktext: ticks.map(i => labels[i]), showgrid: false,
      zeroline: false }),
    valueAxis(yTitle, traces.flatMap(trace => trace.y), options.scale),
    { showlegend: lines.length > 1 });
  // Names of many lines need more room than a margin on top: they stand below the plot.
  if (drawn.length > 3 || isNarrow()) {
    figure.legend = { ...figure.legend, y: -0.2, yanchor: 'top' };
    figure.height = 340 + 22 * Math.ceil(drawn.length / (isNarrow() ? 2 : 5));
  }
  return show(element, traces, figure,
    `${yTitle} against depth. ${drawn.map(spoken).join('; ')}`);
}

// cells: value and text by [module][layer]. Layers go down on a phone, where they would not fit.
function plotHeat(element, cells, layers, modules, title, least) {
  if (!cells.flat().some(cell => Number.isFinite(cell?.value))) {
    return showNothing(element, 'There are no values to draw here.');
  }
  const upright = isNarrow() && layers.length > modules.length;
  const turn = key => upright
    ? layers.map((_, l) => modules.map((_, m) => cells[m][l]?.[key] ?? null))
    : cells.map(row => row.map(cell => cell?.[key] ?? null));
  const names = upright ? modules : layers, downward = upright ? layers : modules;
  const values = cells.flat().map(cell => cell?.value ?? null);
  const [zmin, zmax] = colourRange(values, least, DATA.least_share);
  const trace = {
    type: 'heatmap', zmin, zmax, z: turn('value'), text: turn('text'), customdata: turn('name'),
    hovertemplate: '%{text}: %{z:.5g}<extra></extra>', hoverongaps: false,
    colorscale: 'Viridis', xgap: 1, ygap: 1,
    colorbar: { thickness: 12, outlinewidth: 0,
      ...(isNarrow() ? { orientation: 'h', y: 1.01, yanchor: 'bottom' } : {}) },
  };
  const ticks = list => {
    const step = list === layers ? Math.max(1, Math.ceil(list.length / 40)) : 1;
    const places = list.map((_, i) => i).filter(i => i % step === 0);
    return { tickvals: places, ticktext: places.map(i => list[i] || '–'), showgrid: false,
      zeroline: false };
  };
  const figure = layout(
    axis(upright ? '' : 'layer', { ...ticks(names), ...(upright ? { tickangle: -60 } : {}),
      // Plotly draws the title over the ticks where the scale of colours is on top.
      ...(isNarrow() && !upright ? { title: { text: 'layer', standoff: 24 } } : {}) }),
    axis(upright ? 'layer' : '', { ...ticks(downward), autorange: 'reversed' }),
    { height: Math.max(200, (upright ? 210 : 120) + downward.length * (upright ? 14 : 24)) });
  // The buttons that come up when the mouse is over a plot stand above it.
  figure.margin.t = isNarrow() ? 56 : 32;
  const known = values.filter(value => value !== null);
  return show(element, [trace], figure, `${title} by layer and module`
    + (known.length ? `, from ${shown(Math.min(...known))} to ${shown(Math.max(...known))}` : ''));
}
