'use strict';
/* What the maps are drawn of: pairs of knobs, cells with the best result in each, trials as points. */

const BINS = 8;
const MOST_MAP_KNOBS = 5;

/** How scores become colours: themselves or, over more than a decade, their logarithms. */
function mapGoal(done) {
  const scores = done.map(score);
  const log = spansDecades(scores);
  const of = trial => (log ? Math.log10(score(trial)) : score(trial));
  const colorbar = {
    title: { text: `best ${title(metric())}` }, thickness: 12, ...(log ? ticks({ log, values: scores }) : {}),
  };
  const showscale = innerWidth >= NARROW_PX; // elsewhere it takes the maps' place, and a finger on one tells its best
  return { of, coloraxis: { colorscale: scale(), ...colourEnds(done.map(of)), colorbar, showscale } };
}

/** Where each of `many` maps lies on the plot, whose sides are from 0 to 1. */
function mapGrid(many) {
  const wide = at('plot').clientWidth > 760 ? 3 : at('plot').clientWidth > 480 ? 2 : 1;
  const columns = Math.min(wide, many), rows = Math.ceil(many / Math.max(columns, 1));
  const gapX = 0.11, gapY = rows > 1 ? 0.32 / rows : 0;
  const width = (1 - gapX * (columns - 1)) / columns, height = (1 - gapY * (rows - 1)) / rows;
  const place = index => {
    const left = (index % columns) * (width + gapX), top = 1 - Math.floor(index / columns) * (height + gapY);
    return { left, right: left + width, bottom: Math.max(0, top - height), top };
  };
  return { rows, place };
}

/** The best result of each cell; `done` has the best first. */
function mapCells(x, y, done, goal, here) {
  const xs = cells(x), ys = cells(y), z = ys.map(() => xs.map(() => null)), text = ys.map(() => xs.map(() => ''));
  for (const trial of done) {
    const i = cellOf(x, trial, xs), j = cellOf(y, trial, ys);
    if (z[j][i] !== null) continue;
    z[j][i] = goal(trial);
    text[j][i] = label(trial);
  }
  const hovertemplate = 'best here: %{text}<extra></extra>';
  return {
    ...here, type: 'heatmap', x: xs, y: ys, z, text, hovertemplate, hoverongaps: false, opacity: 0.85, xgap: 1, ygap: 1,
  };
}

function mapPoints(x, y, done, goal, { coloraxis, ...here }) {
  const many = done.length > 300, line = { width: many ? 0.5 : 1, color: css('--ground') };
  return {
    ...here, type: 'scattergl', mode: 'markers',
    x: done.map(trial => x.of(trial) + spread(x, trial, 0.6)),
    y: done.map(trial => y.of(trial) + spread(y, trial, 0.6)),
    customdata: done.map(trial => trial.key), text: done.map(label), hovertemplate: '%{text}<extra></extra>',
    marker: { size: many ? 3 : 6, color: done.map(goal), coloraxis, line },
  };
}

/** The axes of the maps: searched knobs that differ. */
function mapAxes() {
  const searched = new Set(knobs().filter(knob => knob.searched).map(knob => knob.name));
  return parallelAxes().slice(0, -1).filter(axis => searched.has(axis.name) && axis.values?.length !== 1);
}

/** The pairs of `axes` that are drawn: those of the chosen knob, or all of the most important knobs. */
function mapPairs(axes) {
  const across = axes.find(axis => axis.name === choice.mx);
  if (across) {
    const others = axes.filter(axis => axis !== across);
    const chosen = others.filter(axis => axis.name === choice.my);
    return { pairs: (chosen.length ? chosen : others).map(axis => [across, axis]), leftOut: 0 };
  }
  const share = (sweep, name) => sweep.importance?.shares.find(one => one.knob === name)?.share ?? 0;
  const weight = axis => Math.max(0, ...shownSweeps().map(sweep => share(sweep, axis.name)));
  const most = new Set([...axes].sort((a, b) => weight(b) - weight(a)).slice(0, MOST_MAP_KNOBS));
  const kept = axes.filter(axis => most.has(axis));
  const pairs = kept.flatMap((one, index) => kept.slice(0, index).map(other => [other, one]));
  return { pairs, leftOut: axes.length - kept.length };
}

/** Where a map's cells have their middle. */
function cells(axis) {
  if (axis.names) return axis.names.map((_, place) => place);
  const ends = axis.values.map(value => (axis.log ? Math.log10(value) : value));
  const low = Math.min(...ends), high = Math.max(...ends);
  return Array.from({ length: BINS }, (_, index) => low + ((index + 0.5) * (high - low)) / BINS);
}
function cellOf(axis, trial, middles) {
  const place = axis.of(trial);
  if (axis.names) return place;
  return Math.max(0, Math.min(BINS - 1, Math.round((place - middles[0]) / (middles[1] - middles[0]))));
}
function mapTicks(axis) {
  if (!axis.names) return { ...ticks(axis), zeroline: false };
  const ticktext = axis.names.map(name => plain(nameOf(axis, name, 14)));
  return { tickvals: cells(axis), ticktext, automargin: true };
}
