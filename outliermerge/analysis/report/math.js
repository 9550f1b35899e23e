'use strict';

// Numbers only: nothing here knows of the page.

function gaussian(z) {
  return Math.exp(-z * z / 2) / Math.sqrt(2 * Math.PI);
}

// Marsaglia, "Evaluating the Normal Distribution", J. Stat. Software 11 (2004): exact to 1e-10 of
// the tail itself as far out as is drawn here.
function gaussianBelow(z) {
  let sum = z, term = z;
  for (let k = 3; Math.abs(term) > 1e-17 * Math.abs(sum); k += 2) {
    term *= z * z / k;
    sum += term;
  }
  return 0.5 + gaussian(z) * sum;
}

function numFinite(tensor) {
  return tensor.num_elements - tensor.num_non_finite;
}

// The more elements, the finer the bins that noise leaves readable: Freedman and Diaconis (1981),
// 2.7σ / N^(1/3) for a Gaussian, as a power of two of the bins that are stored.
function binsToJoin(num, binWidth) {
  const wanted = 2.7 / Math.cbrt(Math.max(num, 1)) / binWidth;
  return 2 ** Math.min(5, Math.max(0, Math.round(Math.log2(wanted))));
}

// Returns the middles of bins in σ from the mean, and densities per σ; empty bins are kept.
function densities(tensor, grid, minJoined = 1) {
  const { first, counts } = tensor.histogram;
  const joined = Math.max(minJoined, binsToJoin(numFinite(tensor), grid.width));
  const start = Math.floor(first / joined);
  const stop = Math.ceil((first + counts.length) / joined);
  const sums = new Array(Math.max(0, stop - start)).fill(0);
  counts.forEach((count, i) => { sums[Math.floor((first + i) / joined) - start] += count; });
  const width = joined * grid.width;
  return {
    z: sums.map((_, i) => (start + i + 0.5) * width - grid.halfWidth),
    density: sums.map(sum => sum / (numFinite(tensor) * width)),
    one: 1 / (numFinite(tensor) * width),
  };
}

// Whether neighbouring bins differ by more than chance: then the weights have few values, and some
// bins hold more of these than others. By chance a bin's count differs from the mean of its two
// neighbours' with a variance of 1.5 times the count.
function isComb(tensor, grid) {
  const { z, density, one } = densities(tensor, grid);
  const excess = [];
  for (let i = 1; i < z.length - 1; i++) {
    if (Math.abs(z[i]) > 2) continue;
    const [before, here, after] = [density[i - 1], density[i], density[i + 1]].map(d => d / one);
    const expected = (before + 2 * here + after) / 4;
    if (expected > 0) excess.push((here - (before + after) / 2) ** 2 / (1.5 * expected));
  }
  return excess.length > 8 && mean(excess) > 4;
}

// Returns Gaussian quantiles and the tensor's own, both in σ from the mean.
function quantilePairs(tensor, grid) {
  const { first, counts, below } = tensor.histogram;
  const num = numFinite(tensor);
  const pairs = { gaussian: [], own: [] };
  let bin = 0, before = below;
  for (let q = -4.5; q <= 4.5; q += 0.125) {
    const rank = gaussianBelow(q) * num;
    // Beyond the outermost element there is no quantile to draw.
    if (rank < 1 || num - rank < 1 || rank < below) continue;
    while (bin < counts.length && before + counts[bin] < rank) before += counts[bin++];
    if (bin === counts.length) break;
    const place = first + bin + (rank - before) / counts[bin];
    pairs.gaussian.push(q);
    pairs.own.push(place * grid.width - grid.halfWidth);
  }
  return pairs;
}

// Returns number, sum of magnitudes and sum of squares of the elements x with |x| <= limit. A bin
// that the limit cuts counts by the share of its width that is inside.
function inside(tensor, limit, grid) {
  const found = { count: 0, sum: 0, squares: 0 };
  if (tensor.histogram === null) {
    if (Math.abs(tensor.mean) <= limit) {
      found.count = numFinite(tensor);
      found.sum = tensor.l1_norm;
      found.squares = tensor.l2_norm ** 2;
    }
    return found;
  }
  const { first, counts } = tensor.histogram;
  const width = grid.width * tensor.std;
  const left = tensor.mean - grid.halfWidth * tensor.std;
  for (let i = 0; i < counts.length; i++) {
    const low = Math.max(left + (first + i) * width, -limit);
    const high = Math.min(left + (first + i + 1) * width, limit);
    if (high <= low) continue;
    const count = counts[i] * (high - low) / width;
    const middle = Math.abs(low + high) / 2;
    found.count += count;
    found.sum += count * middle;
    found.squares += count * middle * middle;
  }
  return found;
}

// Returns what min-σ does to some tensors of one task vector, as shares of their totals:
// limits are tσ of each, numModels how many task models have it.
function minSigmaShares(tensors, limits, numModels, grid) {
  const total = { count: 0, sum: 0, squares: 0 };
  const noise = { count: 0, sum: 0, squares: 0 };
  const left = { sum: 0, squares: 0 };
  tensors.forEach((tensor, i) => {
    const part = inside(tensor, limits[i], grid);
    const whole = { count: numFinite(tensor), sum: tensor.l1_norm, squares: tensor.l2_norm ** 2 };
    for (const key in total) {
      // Middles of bins stand for their elements, so that a sum can pass the exact total a little.
      const share = Math.min(part[key], whole[key]);
      total[key] += whole[key];
      noise[key] += share;
      if (key === 'sum') left.sum += share / numModels[i];
      if (key === 'squares') left.squares += share / numModels[i] ** 2;
    }
  });
  const shares = key => ({
    whole: 1 - noise[key] / total[key],
    left: left[key] / total[key],
    away: (noise[key] - left[key]) / total[key],
  });
  return {
    count: { whole: 1 - noise.count / total.count, left: noise.count / total.count, away: null },
    sum: shares('sum'),
    squares: shares('squares'),
  };
}

function mean(values) {
  const known = values.filter(value => value !== null && Number.isFinite(value));
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}

function squareSum(values) {
  return values.reduce((total, value) => total + (value ?? 0) ** 2, 0);
}

// Returns a measure of drift over some tensors together: norms add as squares, cosines as products.
function drift(tensors, measure, model) {
  const change = Math.sqrt(squareSum(tensors.map(each => each.change_norm)));
  if (measure === 'base') {
    return ratio(change, Math.sqrt(squareSum(tensors.map(each => each.base_norm))));
  }
  const norm = Math.sqrt(squareSum(tensors.map(each => each.model_norm[model])));
  if (measure === 'length') return ratio(change, norm);
  if (measure === 'distance') {
    return ratio(Math.sqrt(squareSum(tensors.map(each => each.distance[model]))), norm);
  }
  const product = tensors.reduce((total, each) =>
    total + (each.cosine[model] ?? 0) * each.change_norm * each.model_norm[model], 0);
  return measure === 'kept' ? ratio(product, norm ** 2) : ratio(product, change * norm);
}

function ratio(above, below) {
  return below > 0 ? above / below : null;
}

// Returns the ends of a scale of colours, not so near that chance would look large.
function colourRange(values, least, leastShare) {
  const known = values.filter(value => value !== null && Number.isFinite(value));
  if (!known.length) return [0, 1];
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  const wanted = least ?? leastShare * Math.max(Math.abs(low), Math.abs(high));
  const room = Math.max(0, wanted - (high - low)) / 2;
  return [low - room, high + room];
}

// Returns the powers of ten that a log axis shows: at least one decade, for the same reason.
function logRange(values) {
  const known = values.filter(value => value > 0).map(Math.log10);
  if (!known.length) return [-1, 1];
  const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
  const room = Math.max(0.05, (1 - (high - low)) / 2);
  return [low - room, high + room];
}
