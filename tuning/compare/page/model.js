'use strict';
/* What is known of the sweeps, what the person has chosen to see, and the address that holds the choice. */

const loom = {
  sweeps: [], revision: '', live: false, trials: new Map(), troubles: [], left_out: [], news: 0, taken: 0,
  brushing: false,
};

const OF_THE_BEST = 'as measured at its best checkpoint';
const COLUMNS = {
  sweep: { title: 'sweep', of: t => t.sweep.id },
  trial: { title: 'trial', of: t => t.name },
  state: { title: 'state', of: t => t.state },
  steps: { title: 'steps', number: true, of: t => t.steps },
  train_loss: { title: 'train', hint: OF_THE_BEST, number: true, loss: true, of: t => t.train_loss },
  eval_loss: { title: 'eval', hint: OF_THE_BEST, number: true, loss: true, of: t => t.eval_loss },
  tokens_per_second: { title: 'tok/s', hint: OF_THE_BEST, number: true, of: t => t.tokens_per_second },
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

/** In what the sweeps that are shown differ so that their losses may not compare. */
function incomparable() {
  const sweeps = shownSweeps();
  const differs = name => new Set(sweeps.map(({ measured }) => JSON.stringify(measured[name]))).size > 1;
  const names = new Set(sweeps.flatMap(({ measured }) => Object.keys(measured)));
  return [...names].filter(differs);
}

/** What is asked for again and again, of the sweeps that are shown. */
const memo = { off: '', knobs: null, metric: null };
/** The same once it is known that these sweeps are still shown. */
function remembered() {
  if (memo.off !== choice.off) Object.assign(memo, { off: choice.off, knobs: null, metric: null });
  return memo;
}

/** What is minimised; of several sweeps with different metrics, the evaluation loss. */
function metric() {
  if (remembered().metric) return memo.metric;
  const sweeps = shownSweeps();
  const isTraining = sweeps.length > 0 && sweeps.every(sweep => sweep.metric === 'train_loss');
  memo.metric = isTraining ? 'train_loss' : 'eval_loss';
  return memo.metric;
}
const score = trial => trial[metric()];

/** The knobs of the sweeps that are shown, each once; a number in one and a name in another is a name. */
function knobs() {
  if (remembered().knobs) return memo.knobs;
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

/**
 * A knob's value; undefined where the trial has none, for null may be one of the choices. What another sweep searches
 * and this one does not is in the configuration, in another form.
 */
function knobValue({ knobs, config }, name) {
  if (Object.hasOwn(knobs, name)) return knobs[name];
  if (name === 'alpha_over_rank' && config.alpha && config.rank) return config.alpha / config.rank;
  return Array.isArray(config[name]) ? config[name].join('+') : config[name];
}

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
