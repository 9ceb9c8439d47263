'use strict';
/* What is known of the sweeps, what the person has chosen to see, and the address that holds the choice. */

const loom = {
  sweeps: [], revision: '', live: false, trials: new Map(), troubles: [], left_out: [], news: 0, taken: 0,
  brushing: false,
};

const COLUMNS = {
  sweep: { title: 'sweep', of: t => t.sweep.id },
  trial: { title: 'trial', of: t => t.name },
  state: { title: 'state', of: t => t.state },
  steps: { title: 'steps', number: true, of: t => t.steps },
  train_loss: { title: 'train', number: true, loss: true, of: t => t.train_loss },
  eval_loss: { title: 'eval', number: true, loss: true, of: t => t.eval_loss },
  tokens_per_second: { title: 'tok/s', number: true, of: t => t.tokens_per_second },
  adapter_parameters: { title: 'params', number: true, of: t => t.adapter_parameters },
};
const SHORT = { learning_rate: 'lr', target_modules: 'targets', alpha_over_rank: 'alpha/rank' };
const ALIAS = {
  lr: 'learning_rate', targets: 'target_modules', eval: 'eval_loss', train: 'train_loss', params: 'adapter_parameters',
  'tok/s': 'tokens_per_second', 'alpha/rank': 'alpha_over_rank',
};
const VIEWS = {
  curves: 'curves', knobs: 'knobs', importance: 'importance', size: 'size', maps: 'maps', sweeps: 'sweeps',
};
const SWEEP_COLOURS = ['#1f77b4', '#e4722e', '#2a9d5c', '#b83280', '#7a5cc7', '#8c6d1f', '#0e9aa7', '#c2413b'];

/* ---- the choice; what is at its default does not stand in the address ---- */

const DEFAULTS = {
  view: 'curves', off: '', q: '', sort: '', down: '', pin: '', hide: '', cols: '', brush: '', trial: '',
  x: 'steps', loss: 'eval_loss', mx: '', my: '', theme: '',
};
const choice = { ...DEFAULTS };

const ONE_OF = {
  view: Object.keys(VIEWS),
  x: ['steps', 'seconds'],
  loss: ['eval_loss', 'train_loss'],
  theme: ['', 'light', 'dark'],
};

/** An address may come from anywhere: what cannot be is as if it were not there. */
function readAddress() {
  Object.assign(choice, DEFAULTS);
  for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
    if (Object.hasOwn(DEFAULTS, key) && (!ONE_OF[key] || ONE_OF[key].includes(value))) choice[key] = value;
  }
  for (const field of ['off', 'hide', 'cols']) {
    if (unreadable(() => listed(choice[field]))) choice[field] = '';
  }
  if (unreadable(brushes)) choice.brush = '';
}

function unreadable(read) {
  try {
    read();
    return false;
  } catch {
    return true;
  }
}

function address(change = {}) {
  const words = new URLSearchParams();
  for (const [key, value] of Object.entries({ ...choice, ...change })) {
    if (value !== DEFAULTS[key]) words.set(key, value);
  }
  return '#' + words;
}

/** Change the choice, and the address; `quiet` makes no step of the browser's history. */
function choose(change, quiet = false) {
  const next = address(change);
  Object.assign(choice, change);
  if (next !== (location.hash || '#')) history[quiet ? 'replaceState' : 'pushState'](null, '', next);
  loom.render();
}

const listed = text => new Set(text ? text.split(',').map(decodeURIComponent) : []);
const toText = set => [...set].map(encodeURIComponent).join(',');
function toggle(field, key) {
  const set = listed(choice[field]);
  if (!set.delete(key)) set.add(key);
  choose({ [field]: toText(set) });
}

/* ---- the data ---- */

/** Take a document (see tuning/compare/document.py), whole or what has changed. */
function take(told) {
  if (told.whole) loom.trials = new Map();
  loom.revision = told.revision;
  loom.live = told.live;
  loom.troubles = told.troubles;
  loom.left_out = told.left_out;
  loom.sweeps = told.sweeps;
  loom.taken += 1;
  memo.knobs = memo.metric = null;
  told.sweeps.forEach((sweep, index) => {
    sweep.colour = SWEEP_COLOURS[index % SWEEP_COLOURS.length];
    for (const trial of sweep.trials || []) {
      trial.key = `${sweep.id}/${trial.name}`;
      trial.of = sweep.id;
      trial.news = loom.taken;
      loom.trials.set(trial.key, trial);
    }
  });
  const byId = new Map(loom.sweeps.map(sweep => [sweep.id, sweep]));
  for (const [key, trial] of loom.trials) {
    trial.sweep = byId.get(trial.of);
    if (!trial.sweep) loom.trials.delete(key);
  }
}

/** What a sweep does; where nobody can tell whether its driver still runs, when it was heard of last. */
function sweepState(sweep) {
  if (!sweep.last_news_at) return sweep.state;
  const minute = sweep.last_news_at.slice(0, 16).replace('T', ' ');
  return `${sweep.state}, last news ${minute} UTC`;
}
const shownSweeps = () => loom.sweeps.filter(sweep => !listed(choice.off).has(sweep.id));
/** What is minimised; of several sweeps with different metrics, the evaluation loss. */
function metric() {
  if (memo.off !== choice.off) Object.assign(memo, { off: choice.off, knobs: null, metric: null });
  if (memo.metric) return memo.metric;
  const sweeps = shownSweeps();
  const isTraining = sweeps.length > 0 && sweeps.every(sweep => sweep.metric === 'train_loss');
  memo.metric = isTraining ? 'train_loss' : 'eval_loss';
  return memo.metric;
}
const score = trial => trial[metric()];

/** The knobs of the sweeps that are shown, each once; a number in one and a name in another is a name. */
function knobs() {
  if (memo.off !== choice.off) Object.assign(memo, { off: choice.off, knobs: null, metric: null });
  if (memo.knobs) return memo.knobs;
  const found = new Map();
  for (const sweep of shownSweeps()) {
    for (const knob of sweep.knobs) {
      const known = found.get(knob.name);
      found.set(knob.name, known ? {
        ...known,
        kind: known.kind === knob.kind ? known.kind : 'category',
        log: known.log || knob.log,
        searched: known.searched || knob.searched,
      } : knob);
    }
  }
  memo.knobs = [...found.values()];
  return memo.knobs;
}
/** What is asked for again and again, of the sweeps that are shown. */
const memo = { off: '', knobs: null, metric: null };

/** A knob's value; undefined where the trial has none, for null may be one of the choices. */
const knobValue = (trial, name) => (Object.hasOwn(trial.knobs, name) ? trial.knobs[name] : trial.config[name]);

function column(name) {
  if (Object.hasOwn(COLUMNS, name)) return COLUMNS[name];
  const knob = knobs().find(one => one.name === name);
  const of = trial => knobValue(trial, name);
  return knob && { title: SHORT[name] || name, number: knob.kind === 'number', knob, of };
}

function columnNames() {
  const names = [
    'trial', 'state', ...knobs().map(knob => knob.name),
    'steps', 'train_loss', 'eval_loss', 'tokens_per_second', 'adapter_parameters',
  ];
  return shownSweeps().length > 1 ? ['sweep', ...names] : names;
}

/* ---- filters ---- */

const TERM = /^([\w/]+)(>=|<=|!=|=|>|<)(.+)$/;

/** One word of the filter: `column op value`, or text that any cell holds. */
function termTest(term) {
  const parts = TERM.exec(term);
  const fullName = name => (Object.hasOwn(ALIAS, name) ? ALIAS[name] : name);
  const cells = parts && column(fullName(parts[1]));
  if (!cells) {
    const text = term.toLowerCase();
    const holds = value => String(value ?? '').toLowerCase().includes(text);
    return trial => columnNames().some(name => holds(column(name).of(trial)));
  }
  const [, , op, wanted] = parts, number = Number(wanted);
  return trial => {
    const value = cells.of(trial);
    if (op === '=' || op === '!=') {
      const same = typeof value === 'number'
        ? value === number
        : String(value ?? '').toLowerCase() === wanted.toLowerCase();
      return same === (op === '=');
    }
    if (typeof value !== 'number' || Number.isNaN(number)) return false;
    if (op === '>') return value > number;
    if (op === '<') return value < number;
    return op === '>=' ? value >= number : value <= number;
  };
}

/**
 * The brushes of the parallel coordinates, by axis: the values that are kept, by their names, or ranges of numbers,
 * whatever the scale of the axis is now. In the address they are `rank=:8:16` and `learning_rate=0.0001~0.0004`.
 */
function brushes() {
  if (!choice.brush) return new Map();
  return new Map(choice.brush.split(';').map(part => {
    const [name, kept] = part.split('=');
    const brush = kept.startsWith(':')
      ? { names: kept.slice(1).split(':').map(decodeURIComponent) }
      : { ranges: kept.split(',').map(range => range.split('~').map(Number)) };
    return [decodeURIComponent(name), brush];
  }));
}

function brushText(map) {
  const namesText = names => names.map(each => `:${encodeURIComponent(each)}`).join('');
  const rangesText = ranges => ranges.map(range => range.join('~')).join(',');
  const keptText = ({ names, ranges }) => (names ? namesText(names) : rangesText(ranges));
  return [...map].map(([name, brush]) => `${encodeURIComponent(name)}=${keptText(brush)}`).join(';');
}

function brushTest(axis, { names, ranges }) {
  if (names) return trial => names.includes(String(axis.value(trial)));
  return trial => ranges.some(([low, high]) => axis.value(trial) >= low && axis.value(trial) <= high);
}

/** The trials that are shown. `brushed` false leaves the brushes out, for the plot that draws them. */
function shown(brushed = true) {
  const off = listed(choice.off), hidden = listed(choice.hide);
  const tests = choice.q.split(/\s+/).filter(Boolean).map(termTest);
  const isKept = trial => !off.has(trial.of) && !hidden.has(trial.key) && tests.every(test => test(trial));
  let found = [...loom.trials.values()].filter(isKept);
  if (brushed && choice.brush) {
    const axes = parallelAxes();
    for (const [name, brush] of brushes()) {
      const axis = axes.find(one => one.name === name);
      if (axis) found = found.filter(brushTest(axis, brush));
    }
  }
  return found;
}

const FEW = 8;
/**
 * The axes of the plots: all knobs that differ, then the metric. `of` is a trial's place on it: a number, its logarithm
 * (`log`), or the place of its value among `names`; a few different numbers are names too, for what is between them
 * nobody asks.
 */
function parallelAxes() {
  const off = listed(choice.off);
  const trials = [...loom.trials.values()].filter(trial => !off.has(trial.of));
  const place = (number, log) => (log ? Math.log10(number) : number);
  const axes = [];
  for (const knob of knobs()) {
    const value = trial => knobValue(trial, knob.name);
    const values = [...new Set(trials.map(value).filter(each => each !== undefined))];
    if (values.length < 2 && !knob.searched) continue;
    const numeric = knob.kind === 'number' && values.every(each => typeof each === 'number');
    if (numeric && values.length > FEW) {
      const log = knob.log && values.every(each => each > 0);
      const of = trial => (value(trial) === undefined ? null : place(value(trial), log));
      axes.push({ name: knob.name, log, values, value, of });
    } else {
      const names = (numeric ? values.sort((a, b) => a - b) : values.sort()).map(String);
      const places = new Map(names.map((name, index) => [name, index]));
      const of = trial => places.get(String(value(trial))) ?? null;
      axes.push({ name: knob.name, names, numeric, values, value, of });
    }
  }
  const scores = trials.map(score).filter(each => each !== null);
  const log = scores.length > 0 && Math.min(...scores) > 0 && Math.max(...scores) > 10 * Math.min(...scores);
  const of = trial => (score(trial) === null ? null : place(score(trial), log));
  axes.push({ name: metric(), log, values: scores, value: score, of });
  return axes;
}

/** In the table's order; what has no value comes last. */
function sorted(trials) {
  const cells = column(choice.sort || metric()) || COLUMNS.eval_loss;
  const sign = choice.down ? -1 : 1;
  const compare = (a, b) => {
    const areNumbers = typeof a === 'number' && typeof b === 'number';
    return areNumbers ? a - b : String(a).localeCompare(String(b));
  };
  return [...trials].sort((one, other) => {
    const a = cells.of(one), b = cells.of(other);
    if (a == null || b == null) return (a == null) - (b == null) || one.key.localeCompare(other.key);
    return sign * compare(a, b) || one.key.localeCompare(other.key);
  });
}

const byScore = trials => trials.filter(trial => score(trial) !== null).sort((a, b) => score(a) - score(b));

/* ---- words ---- */

function figure(name, value) {
  if (value === undefined || (value === null && !knobs().some(knob => knob.name === name))) return '–';
  if (typeof value !== 'number') return String(value);
  if (COLUMNS[name]?.loss) return value.toFixed(4);
  if (name === 'adapter_parameters') return value.toLocaleString('en-US');
  if (name === 'tokens_per_second') return Math.round(value).toLocaleString('en-US');
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : String(+value.toPrecision(4));
}

/** An element; text is text, whatever it holds. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    const isLeftOut = value === null || value === undefined || value === false;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (!isLeftOut) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const at = id => document.getElementById(id);

/** Fill an element anew where what it shows has changed, and not else: somebody may be using it. */
function fill(element, shows, make) {
  const key = JSON.stringify(shows);
  if (element.shows === key) return;
  element.shows = key;
  const held = element.contains(document.activeElement) ? document.activeElement.dataset.held : null;
  element.replaceChildren(...make().filter(Boolean));
  if (held) element.querySelector(`[data-held="${CSS.escape(held)}"]`)?.focus();
}

/** Text for Plotly, which takes some tags for markup. */
const plain = text => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');

/** A trial's name, with its sweep's where there are several. */
const trialName = trial => (shownSweeps().length > 1 ? trial.key : trial.name);

/** What tells a trial in a plot. */
function label(trial) {
  const told = knobs().filter(knob => knobValue(trial, knob.name) !== undefined);
  const parts = told.map(({ name }) => `${SHORT[name] || name} ${figure(name, knobValue(trial, name))}`);
  const result = `${metric()} ${figure(metric(), score(trial))}`;
  return [`${trialName(trial)} (${trial.state})`, parts.join(', '), result].map(plain).join('<br>');
}
