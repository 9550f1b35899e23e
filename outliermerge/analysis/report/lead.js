'use strict';

// What a page opens with: a sentence and three numbers.

const MAX_VALUES = 4;
const GAUSSIAN_BEYOND_3 = 0.0026997960632601866;

// Returns a value for each of some models; of many, only the least and the greatest.
function valuesOf(titles, values, text, isOnly = titles.length === 1) {
  const known = titles.map((title, i) => [title, values[i]])
    .filter(([, value]) => value !== null && Number.isFinite(value));
  if (isOnly) return known.map(([, value]) => ['', text(value)]);
  if (known.length <= MAX_VALUES) return known.map(([title, value]) => [title, text(value)]);
  known.sort((a, b) => a[1] - b[1]);
  const [least, most] = [known[0], known.at(-1)];
  return [[`least, ${least[0]}`, text(least[1])], [`most, ${most[0]}`, text(most[1])]];
}

// Values that differ by less than this share of the larger one are about the same.
const SAME_WITHIN = 0.1;

// Returns the least and the greatest value with their titles, as [text, title]; `same` if they are
// about the same, and null if there are no two.
function extremes(titles, values, text) {
  const known = values.map((value, i) => [value, titles[i]])
    .filter(([value]) => value !== null && Number.isFinite(value)).sort((a, b) => a[0] - b[0]);
  if (known.length < 2) return null;
  const [least, most] = [known[0], known.at(-1)];
  const same = most[0] - least[0] <= SAME_WITHIN * Math.max(Math.abs(most[0]), Math.abs(least[0]));
  return { same, least: [text(least[0]), least[1]], most: [text(most[0]), most[1]],
    num: known.length };
}

function shareText(value) {
  return percent(value, value > 0 && value < 0.001 ? 3 : Math.abs(value) < 0.9995 ? 1 : 0);
}

function sizesOf(subject) {
  return { elements: subject.tensors.reduce((sum, each) => sum + each.num_elements, 0),
    norm: Math.sqrt(squareSum(subject.tensors.map(each => each.l2_norm))) };
}

function sizeNumber(subject) {
  const matrices = subject.tensors.filter(each => each.is_matrix).length;
  return { title: 'Parameters', values: [['', shown(sizesOf(subject).elements)]],
    note: `in ${shown(subject.tensors.length)} tensors, ${shown(matrices)} of them matrices` };
}

function groupValues(subjects, key) {
  return subjects.map(each => each.groups.model[0][key]);
}

// The lead of models without a base: how large, how Gaussian, how wide.
function leadOfWeights(subjects) {
  const titles = subjects.map(each => each.title);
  const inside = groupValues(subjects, 'kept_ratio_mean');
  const [first] = subjects, { labels } = first.groups.model[0];
  const { filter } = first;
  const forms = labels ? ` Its matrices by form: ${labels}.` : '';
  const among = inside.filter(value => value !== null);
  const text = among.length
    ? `Of a matrix’s elements ${spanText(among, 2)} lie within ${filter}σ of the mean`
      + `${filter === 3 ? ', where an exact Gaussian has 99.73%' : ''}.` : '';
  return {
    sentence: subjects.length === 1 ? `${text}${forms}`
      : `The weights of ${subjects.length} models. ${text}`,
    numbers: [
      sizeNumber(first),
      { title: `Within ${filter}σ`, values: valuesOf(titles, inside, value => percent(value)),
        note: 'of the elements of a matrix, on average' },
      { title: 'σ', values: valuesOf(titles, groupValues(subjects, 'std_mean'), shown),
        note: 'of a matrix, on average' },
    ],
  };
}

function spanText(values, digits) {
  const [low, high] = [Math.min(...values), Math.max(...values)].map(each => percent(each, digits));
  return low === high ? low : `${low} to ${high}`;
}

// The lead of task vectors: how far from the base, how many outliers, how much unchanged.
function leadOfChanges(subjects) {
  const titles = subjects.map(each => each.title);
  const moved = subjects.map(each => ratio(sizesOf(each).norm, DATA.base_norm));
  const beyond = groupValues(subjects, 'outside_3_ratio_mean');
  const same = subjects.map(each => ratio(each.tensors.reduce((sum, tensor) =>
    sum + (tensor.zero_ratio ?? 0) * numFinite(tensor), 0),
  each.tensors.reduce((sum, tensor) => sum + numFinite(tensor), 0)));
  const base = subjects[0].base.split('/').filter(Boolean).pop();
  const far = extremes(titles, moved, shareText);
  const times = distinct(beyond.filter(value => value !== null)
    .map(value => (value / GAUSSIAN_BEYOND_3).toFixed(1)).sort((x, y) => x - y));
  const outliers = times.length ? ` Beyond 3σ are ${times[0]}`
    + `${times.length > 1 ? ` to ${times.at(-1)}` : ''} times as many changes as in a Gaussian.` : '';
  const who = subjects.length === 1 ? `${titles[0]} is ${base}, changed by `
    + `${shareText(moved[0])} of its size.` : far && !far.same
    ? `Against ${base}, ${far.most[1]} changed ${far.num > 2 ? 'most' : 'more'} `
      + `(${far.most[0]}), ${far.least[1]} ${far.num > 2 ? 'least' : 'less'} (${far.least[0]}).`
    : `Against ${base}, ${subjects.length === 2 ? 'both' : `all ${subjects.length}`} models changed `
      + 'about as much.';
  return {
    sentence: `${who}${outliers}`,
    numbers: [
      { title: 'Change from the base', values: valuesOf(titles, moved, shareText),
        note: 'how large the change is, as a share of the base’s own size',
        formula: '‖ΔW‖ / ‖W₀‖; W₀ is the base, ΔW the model − W₀, ‖ ‖ the root of the sum of squares' },
      { title: 'Outliers', values: valuesOf(titles, beyond, shareText),
        note: 'of a matrix’s changes, beyond 3σ; 0.27% of a Gaussian’s' },
      { title: 'Unchanged', values: valuesOf(titles, same, shareText), note: 'of all elements' },
      sizeNumber(subjects[0]),
    ],
  };
}

function keptText({ same, least, most, num }) {
  if (least[0] === most[0]) return ` It kept ${least[0]} of each model’s change.`;
  if (same) return ` It kept about as much of each model’s change, ${least[0]} to ${most[0]}.`;
  if (num === 2) {
    return ` It kept ${most[0]} of the change of ${most[1]}, and ${least[0]} of that of ${least[1]}.`;
  }
  return ` Of the models’ changes it kept from ${least[0]} (${least[1]}) to ${most[0]} (${most[1]}).`;
}

function movedNumber(value) {
  return { title: 'Moved from the base', values: valuesOf([''], [value], shareText),
    note: 'how large the output’s change is, as a share of the base’s own size',
    formula: `‖ΔW*‖ / ‖W₀‖; ${SYMBOLS_OF_CHANGES}` };
}

// The lead of a merge: what was kept of the models, and how far the output moved.
function leadOfMerge() {
  const numbers = [];
  let where = '';
  if (DATA.drift) {
    const { models, tensors, has_base: hasBase } = DATA.drift;
    const isOnly = DATA.merge.inputs
      .filter(each => each.role !== 'base' || !hasBase).length === 1;
    const values = measure => models.map((_, model) => drift(tensors, measure, model));
    if (hasBase) {
      const kept = extremes(models, values('kept'), shareText);
      where = kept ? keptText(kept) : '';
      numbers.push(
        { title: 'Kept of each change', values: valuesOf(models, values('kept'), shareText, isOnly),
          note: 'how much of the model’s change from the base is in the output',
          formula: `⟨ΔW*, ΔWᵢ⟩ / ‖ΔWᵢ‖²; ${SYMBOLS_OF_CHANGES}` },
        movedNumber(drift(tensors, 'base', 0)));
    } else {
      const far = extremes(models, values('distance'), shareText);
      where = !far ? '' : far.same ? ' It is about as far from each of them.'
        : ` It is nearest to ${far.least[1]} and farthest from ${far.most[1]}.`;
    }
    numbers.push({ title: 'Distance from each model',
      values: valuesOf(models, values('distance'), shareText, isOnly),
      note: hasBase ? '0%: equal to the model; 100%: as far from it as the base is'
        : '0%: equal to the model; 100%: as far from it as the model is large',
      formula: hasBase ? `‖W* − Wᵢ‖ / ‖ΔWᵢ‖; ${SYMBOLS_OF_CHANGES}`
        : `‖W* − Wᵢ‖ / ‖Wᵢ‖; ${SYMBOLS_OF_WEIGHTS}` });
  }
  const changed = SUBJECTS.find(each => each.role === 'output' && each.base !== null);
  if (!DATA.drift && changed) {
    numbers.push(movedNumber(ratio(sizesOf(changed).norm, DATA.base_norm)));
  }
  const whole = Object.entries(DATA.merge.by_model['kept whole, %'] ?? {});
  numbers.push({ title: 'Kept whole', note: 'of each model’s changes',
    values: valuesOf(whole.map(each => each[0]), whole.map(each => each[1][0] / 100),
      shareText) });
  numbers.push({ title: 'Tensors', values: Object.entries(DATA.merge.actions)
    .map(([action, num]) => [DONE[action] ?? action, shown(num)]), note: '' });
  return { sentence: `${inputsText()}${where}`, numbers: [...numbers, sizeNumber(SUBJECTS[0])] };
}

// Returns words that open to a formula; a mouse that rests on them shows it, too.
function folded(words, formula) {
  const details = element('details');
  details.append(element('summary', words), element('span', formula));
  details.title = formula;
  return details;
}

function showLead() {
  const changes = SUBJECTS.filter(each => each.base !== null);
  const { sentence, numbers } = DATA.merge ? leadOfMerge()
    : changes.length ? leadOfChanges(changes) : leadOfWeights(SUBJECTS);
  byId('sentence').textContent = sentence;
  const three = numbers.filter(each => each.values.length).slice(0, 3);
  byId('numbers').replaceChildren(...three.map(({ title, values, note, formula }) => {
    const card = element('div');
    card.append(element('dt', title), ...values.map(([name, text]) => {
      const value = element('dd', text);
      if (name) value.append(element('span', name));
      return value;
    }));
    if (note) {
      const explained = element('dd', formula ? undefined : note);
      explained.className = 'note';
      if (formula) explained.append(folded(note, formula));
      card.append(explained);
    }
    return card;
  }));
  const notes = distinct([...DATA.notes, ...SUBJECTS.flatMap(each => each.notes)]);
  byId('notes').hidden = notes.length === 0;
  byId('notes').replaceChildren(...notes.map(note => element('li', note)));
}
