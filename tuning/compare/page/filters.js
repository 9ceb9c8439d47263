'use strict';
/* Which trials are shown, by the filter, the brushes and what is hidden; in which order, and along which axes. */

/** Columns that the filter names and that are not there: their words count as text. */
function unknownColumns() {
  const named = choice.q.split(/\s+/).map(term => TERM.exec(term)?.[1]).filter(Boolean);
  return named.filter(name => !column(fullName(name)));
}

const fullName = name => (Object.hasOwn(ALIAS, name) ? ALIAS[name] : name);
const TERM = /^([\w/]+)(>=|<=|!=|=|>|<)(.+)$/;

/** One word of the filter: `column op value`, or text that any cell holds. */
function termTest(term) {
  const parts = TERM.exec(term);
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
        : String(value === undefined ? '' : value).toLowerCase() === wanted.toLowerCase();
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

/** Over more than a decade, logarithms tell more. */
const spansDecades = numbers => Math.min(...numbers) > 0 && Math.max(...numbers) > 10 * Math.min(...numbers);

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
  const log = spansDecades(scores);
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
