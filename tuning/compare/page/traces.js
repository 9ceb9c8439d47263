'use strict';
/* What the plots are drawn of: traces, axes, colours, brushes. The maps are in maps.js. */

/* ---- curves ---- */

const CURVE = { hovertemplate: '%{text}<br>%{x}: %{y:.4f}<extra></extra>', mode: 'lines', type: 'scatter' };
const ENDS = { stopped: ['x', '--warn'], diverged: ['triangle-up', '--bad'], failed: ['square', '--bad'] };

/** The trials that are drawn in a colour of their own: the best, and the pinned one. */
function curveColours(trials) {
  const colours = new Map(byScore(trials).slice(0, BEST_IN_COLOUR).map((trial, index) => [trial, PALETTE[index]]));
  const pinned = loom.trials.get(choice.pin);
  if (pinned) colours.set(pinned, css('--text'));
  return colours;
}

/** A trial's points, laid at the end of a trace's data. */
function addCurve(data, trial) {
  const text = label(trial), { steps } = trial.curve;
  for (let index = 0; index < steps.length; index++) {
    data.x.push(trial.curve[choice.x][index]);
    data.y.push(trial.curve[choice.loss][index]);
    data.customdata.push(trial.key);
    data.text.push(text);
  }
}

/** One trace of many trials, with a gap after each; none of none. */
function faintCurves(trials) {
  if (!trials.length) return [];
  const data = { x: [], y: [], customdata: [], text: [] };
  for (const trial of trials) {
    addCurve(data, trial);
    data.x.push(null);
    data.y.push(null);
    data.customdata.push(null);
    data.text.push('');
  }
  const type = trials.length > MOST_IN_SVG ? 'scattergl' : 'scatter', line = { color: css('--faint'), width: 1 };
  return [{ ...CURVE, ...data, name: `${trials.length} others`, type, line, opacity: crowd(trials.length) }];
}

function curveTrace(trial, colour) {
  const data = { x: [], y: [], customdata: [], text: [] }, isPinned = trial.key === choice.pin;
  addCurve(data, trial);
  return {
    ...CURVE, ...data, name: plain(trialName(trial)) + (isPinned ? ' (pinned)' : ''),
    mode: trial.curve.steps.length > 1 ? 'lines' : 'lines+markers',
    line: { color: colour, width: isPinned ? 3 : 2, dash: isPinned ? 'dash' : 'solid' },
  };
}

/** Marks where trials ended before their time: a trace for each way. */
function curveEnds(trials) {
  const lastFinite = trial => trial.curve[choice.loss].findLastIndex(value => value !== null);
  const traces = [];
  for (const [state, [symbol, colour]] of Object.entries(ENDS)) {
    const ended = trials.filter(trial => trial.state === state && trial.curve.steps.length);
    if (!ended.length) continue;
    const places = ended.map(trial => [trial, lastFinite(trial)]).filter(([, index]) => index >= 0);
    traces.push({
      ...CURVE, mode: 'markers', name: `${state} here`,
      x: places.map(([trial, index]) => trial.curve[choice.x][index]),
      y: places.map(([trial, index]) => trial.curve[choice.loss][index]),
      customdata: places.map(([trial]) => trial.key), text: places.map(([trial]) => label(trial)),
      marker: { symbol, size: places.length > 200 ? 5 : 7, color: css(colour), opacity: crowd(places.length) },
    });
  }
  return traces;
}

/** An axis for a loss whose `values` are all above zero; over more than a decade or so it is logarithmic. */
function lossAxis(name, values) {
  let low = Infinity, high = 0;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  const text = { title: { text: title(name) } };
  return high > 20 * low ? { ...text, type: 'log', dtick: 1, exponentformat: 'power' } : { ...text, type: 'linear' };
}

/* ---- knobs, importance, size ---- */

/** One axis of the parallel coordinates, as Plotly wants it. */
function parallelDimension(axis, trials) {
  const values = trials.map(trial => axis.of(trial) + spread(axis, trial, 0.2));
  const dimension = { label: plain(title(axis.name)), name: axis.name, values };
  const brushed = brushes().get(axis.name), place = end => Math.log10(Math.max(end, Number.MIN_VALUE));
  if (brushed) {
    const ranges = brushed.ranges || [];
    const kept = axis.names ? placesKept(axis, brushed) : axis.log ? ranges.map(range => range.map(place)) : ranges;
    if (kept.length) dimension.constraintrange = kept.length > 1 ? kept : kept[0];
  }
  if (axis.names) {
    dimension.tickvals = axis.names.map((_, index) => index);
    const texts = axis.names.map(name => plain(nameOf(axis, name, 24)));
    // Plotly takes equal texts for one tick, and would move all after it.
    dimension.ticktext = texts.map((text, place) => text + '\u200b'.repeat(texts.indexOf(text) === place ? 0 : place));
    dimension.range = [-0.3, axis.names.length - 0.7];
  } else if (axis.log) Object.assign(dimension, fineTicks(axis));
  return dimension;
}

function shareBars(sweep, names) {
  const shares = new Map(sweep.importance.shares.map(share => [share.knob, share]));
  const of = pick => names.map(name => (shares.has(name) ? pick(shares.get(name)) : null));
  return {
    type: 'bar', orientation: 'h', name: plain(sweep.id), y: names.map(title), x: of(share => share.share),
    marker: { color: sweep.colour },
    error_x: {
      type: 'data', symmetric: false, color: css('--text'), thickness: 1.5,
      array: of(share => share.high - share.share), arrayminus: of(share => share.share - share.low),
    },
    customdata: of(share => [share.low, share.high]),
    hovertemplate: '%{y}: %{x:.0%} (90 % of resampled sweeps: %{customdata[0]:.0%} to %{customdata[1]:.0%})'
      + '<extra></extra>',
  };
}

/** The trials that no smaller one beats, smallest first. */
function sizeFront(trials) {
  const front = [];
  const bySize = (a, b) => a.adapter_parameters - b.adapter_parameters || score(a) - score(b);
  for (const trial of [...trials].sort(bySize)) {
    if (!front.length || score(trial) < score(front.at(-1))) front.push(trial);
  }
  return front;
}

function sizePoints(trials) {
  return {
    x: trials.map(trial => trial.adapter_parameters), y: trials.map(score), customdata: trials.map(trial => trial.key),
    text: trials.map(label), hovertemplate: '%{text}<br>%{x:,} parameters<extra></extra>',
  };
}

/* ---- sweeps ---- */

/** The rows of the table: what is told of each sweep. */
function sweepFacts(sweeps, trials) {
  const fact = (text, of) => ({ text, values: sweeps.map(of) });
  const best = sweep => byScore(trials.filter(trial => trial.sweep === sweep))[0];
  const ofBest = of => sweep => (best(sweep) ? of(best(sweep)) : '–');
  const ended = sweep => [...loom.trials.values()]
    .filter(trial => trial.sweep === sweep && !['running', 'waiting'].includes(trial.state)).length;
  const isSearched = (sweep, name) => sweep.knobs.some(knob => knob.name === name && knob.searched);
  const ofTrials = (sweep, name) => (isSearched(sweep, name) ? 'searched' : String(sweep.shared[name] ?? '–'));
  const searched = sweep => sweep.knobs.filter(knob => knob.searched).map(knob => knob.name).join(', ') || '–';
  const settings = new Set(sweeps.flatMap(sweep => Object.keys(sweep.settings)));
  const shared = new Set(sweeps.flatMap(sweep => Object.keys(sweep.shared)));
  const packages = new Set(sweeps.flatMap(sweep => Object.keys(sweep.versions)));
  return [
    fact('state', sweepState),
    fact('trials ended of those planned', sweep => `${ended(sweep)} of ${sweep.planned}`),
    fact(`best ${title(metric())}`, ofBest(trial => figure('eval_loss', score(trial)))),
    fact('its trial', ofBest(trial => trial.name)),
    ...knobs().map(({ name }) => fact(`its ${title(name)}`, ofBest(trial => figure(name, knobValue(trial, name))))),
    fact('seconds', sweep => figure('', sweep.seconds)),
    fact('started', sweep => sweep.started_at),
    fact('steps of a trial', sweep => String(sweep.steps)),
    fact('searched', searched),
    ...[...settings].map(name => fact(name, sweep => String(sweep.settings[name] ?? '–'))),
    ...[...shared].map(name => fact(name, sweep => ofTrials(sweep, name))),
    ...[...packages].map(name => fact(`${name} (version)`, sweep => sweep.versions[name] || '–')),
    fact('folder', sweep => sweep.folder),
  ];
}

/* ---- helpers of the views ---- */

/** How opaque one of many is, so that a crowd is no wall. */
const crowd = many => Math.max(0.12, Math.min(1, 60 / many));

/** The ends of the colours: the worst tenth all has the last one, so that the others differ. */
function colourEnds(values) {
  const ordered = [...values].sort((a, b) => a - b);
  if (ordered.length < 2) return {};
  const low = ordered[0], high = ordered[Math.ceil(0.9 * (ordered.length - 1))];
  return high > low ? { cmin: low, cmax: high } : {};
}

function remark(text) { at('remark').textContent = text; }

/** Round ticks for an axis that holds logarithms, which Plotly would label as they are. */
function ticks(axis) {
  if (!axis.log) return {};
  const low = Math.min(...axis.values), high = Math.max(...axis.values);
  const few = [...new Set(axis.values)].sort((a, b) => a - b);
  let marks = few;
  if (few.length > 6) {
    const steps = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
    marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const step of steps) marks.push(step * 10 ** power);
    }
    marks = marks.filter(mark => mark >= low * 0.999 && mark <= high * 1.001);
    if (marks.length < 2) marks = [low, high];
  }
  return { tickvals: marks.map(Math.log10), ticktext: marks.map(mark => figure('', +mark.toPrecision(2))) };
}

const FINE = 60;
/**
 * The same for parallel coordinates, whose brushes snap to ticks: between those with a text lie many whose text is not
 * seen (each another: Plotly takes equal texts for one tick).
 */
function fineTicks(axis) {
  const { tickvals, ticktext } = ticks(axis), ends = axis.values.map(Math.log10);
  const low = Math.min(...ends), high = Math.max(...ends);
  const texts = new Map();
  for (let index = 0; index <= FINE; index++) {
    texts.set(low + (index * (high - low)) / FINE, '\u200b'.repeat(index + 1));
  }
  tickvals.forEach((value, index) => texts.set(value, ticktext[index]));
  const all = [...texts].sort(([a], [b]) => a - b);
  return { tickvals: all.map(([value]) => value), ticktext: all.map(([, text]) => text) };
}

/** Sets trials with the same name apart a little, so that one sees how many there are. */
const spread = (axis, trial, width) => (axis.names ? (noise(axis.name + trial.key) - 0.5) * width : 0);
/** The same number from 0 to 1 for the same text, always. */
function noise(text) {
  let state = 2166136261;
  for (const character of text) state = Math.imul(state ^ character.charCodeAt(0), 16777619);
  state = Math.imul(state ^ (state >>> 16), 0x85ebca6b); // the last characters count as much as the first
  state = Math.imul(state ^ (state >>> 13), 0xc2b2ae35);
  return ((state ^ (state >>> 16)) >>> 0) / 2 ** 32;
}

/** Where a brush lies on an axis of names. */
function placesKept(axis, brush) {
  const test = brushTest({ value: name => name }, brush);
  const isKept = name => test(axis.numeric && brush.ranges ? Number(name) : name);
  return axis.names.flatMap((name, place) => (isKept(name) ? [[place - 0.25, place + 0.25]] : []));
}

/** The end of a brush as a number that is short to write, and not inside of what was brushed. */
function outward(axis, end, sign) {
  const value = axis.log ? 10 ** end : end, short = +value.toPrecision(6);
  return sign * (value - short) > 0 ? +(short + sign * Math.abs(short) * 1e-5).toPrecision(6) : short;
}

/** Plotly tells of a brush as a restyle of `dimensions[i].constraintrange`. */
function heardBrush([changes]) {
  if (choice.view !== 'knobs') return;
  const ranges = brushes(), axes = parallelAxes();
  for (const [key, value] of Object.entries(changes)) {
    const axis = axes[Number(/^dimensions\[(\d+)\]\.constraintrange$/.exec(key)?.[1] ?? -1)];
    if (!axis) continue;
    const kept = value?.[0], list = !kept?.length ? [] : Array.isArray(kept[0]) ? kept : [kept];
    const names = axis.names?.filter((_, place) => list.some(([low, high]) => place >= low && place <= high));
    const wider = () => list.map(([low, high]) => [outward(axis, low, -1), outward(axis, high, 1)]);
    if (!list.length) ranges.delete(axis.name);
    else ranges.set(axis.name, names ? { names } : { ranges: wider() });
  }
  loom.brushing = true;
  choose({ brush: brushText(ranges) }, true);
}
