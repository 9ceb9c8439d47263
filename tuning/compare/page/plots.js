'use strict';
/* The plots: each view makes traces and a layout of the trials that are shown, and Plotly draws them. */

const BEST_IN_COLOUR = 10;
const PALETTE = ['#1f77b4', '#e4722e', '#2a9d5c', '#c2413b', '#7a5cc7', '#8c6d1f', '#c45aa0', '#0e9aa7', '#6b8e23', '#4a6fa5'];
/** Low is good: dark in the light theme, bright in the dark one. */
const SCALE = { light: [[0, '#0b3d91'], [0.25, '#2f7fc1'], [0.5, '#62b8b0'], [0.75, '#c9cf6a'], [1, '#e7c9a0']],
  dark: [[0, '#f6e27f'], [0.25, '#8fd694'], [0.5, '#3fa7b5'], [0.75, '#3b6aa8'], [1, '#4b4274']] };
const MOST_MAP_KNOBS = 5;
const NARROW_PX = 720;
/** Lines of more trials are left to WebGL. */
const MOST_IN_SVG = 300;

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const scale = () => SCALE[document.documentElement.dataset.theme === 'dark' ? 'dark' : 'light'];

function layout(more) {
  const axis = { gridcolor: css('--line'), zerolinecolor: css('--line'), linecolor: css('--line') };
  const merged = {
    paper_bgcolor: css('--ground'), plot_bgcolor: css('--ground'), font: { color: css('--text'), size: 12 }, autosize: true,
    margin: { l: 60, r: 20, t: 20, b: 45 }, hoverlabel: { align: 'left', bgcolor: css('--raised'), bordercolor: css('--line'), font: { color: css('--text') } },
    legend: { orientation: 'v', font: { size: 11 } }, hovermode: 'closest', uirevision: choice.view, ...more };
  if (innerWidth < NARROW_PX) merged.showlegend = false; // a finger on a line tells its name
  for (const key of Object.keys(merged)) if (/^[xy]axis/.test(key)) merged[key] = { ...axis, ...merged[key] };
  return merged;
}
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ['lasso2d', 'select2d'] };

function draw(traces, shape) {
  const plot = at('plot');
  return Plotly.react(plot, traces, layout(shape), CONFIG).then(() => {
    if (plot.dataset.heard) return;
    plot.dataset.heard = '1';
    plot.on('plotly_click', event => {
      const key = event.points?.[0]?.customdata;
      if (typeof key === 'string' && loom.trials.has(key)) choose({ trial: key });
    });
    plot.on('plotly_restyle', heardBrush);
  });
}

/** Take what is drawn away: a plot of another kind, or a table, comes. */
function clearPlot(sheet) {
  const plot = at('plot');
  Plotly.purge(plot);
  delete plot.dataset.heard;
  plot.replaceChildren();
  plot.classList.toggle('sheet', Boolean(sheet));
}

const title = name => SHORT[name] || name.replaceAll('_', ' ');
const option = (value, text, chosen) => el('option', { value, selected: value === chosen }, text);
function chooser(name, text, options) {
  return el('label', {}, text, el('select', { 'data-choice': name, onchange: event => choose({ [name]: event.target.value }) },
    ...options.map(([value, words]) => option(value, words, choice[name]))));
}

const views = {
  /* Loss curves laid over each other. The best are in colour, the others one faint trace with gaps. */
  curves: {
    controls: () => [chooser('x', 'by', [['steps', 'step'], ['seconds', 'time']]), chooser('loss', 'loss', [['eval_loss', 'evaluation'], ['train_loss', 'training']])],
    draw(trials) {
      const best = byScore(trials).slice(0, BEST_IN_COLOUR), pinned = loom.trials.get(choice.pin), colours = new Map();
      best.forEach((trial, index) => colours.set(trial, PALETTE[index]));
      if (pinned) colours.set(pinned, css('--text'));
      const line = (trial, xs, ys, keys, texts) => {
        const text = label(trial);
        for (let index = 0; index < trial.curve.steps.length; index++) {
          xs.push(trial.curve[choice.x][index]); ys.push(trial.curve[choice.loss][index]); keys.push(trial.key); texts.push(text);
        }
      };
      const faint = { x: [], y: [], customdata: [], text: [] };
      for (const trial of trials) if (!colours.has(trial)) {
        line(trial, faint.x, faint.y, faint.customdata, faint.text);
        faint.x.push(null); faint.y.push(null); faint.customdata.push(null); faint.text.push('');
      }
      const common = { hovertemplate: '%{text}<br>%{x}: %{y:.4f}<extra></extra>', mode: 'lines', type: 'scatter' };
      const traces = [];
      const others = trials.filter(trial => !colours.has(trial)).length;
      if (others) traces.push({ ...common, ...faint, name: `${others} others`, type: others > MOST_IN_SVG ? 'scattergl' : 'scatter', line: { color: css('--faint'), width: 1 }, opacity: crowd(others) });
      for (const [trial, colour] of [...colours].reverse()) {
        const data = { x: [], y: [], customdata: [], text: [] };
        line(trial, data.x, data.y, data.customdata, data.text);
        const name = plain(trialName(trial)) + (trial === pinned ? ' (pinned)' : '');
        traces.push({ ...common, ...data, name, mode: trial.curve.steps.length > 1 ? 'lines' : 'lines+markers', line: { color: colour, width: trial === pinned ? 3 : 2, dash: trial === pinned ? 'dash' : 'solid' } });
      }
      const marks = { stopped: ['x', '--warn'], diverged: ['triangle-up', '--bad'], failed: ['square', '--bad'] };
      for (const [state, [symbol, colour]] of Object.entries(marks)) {
        const ended = trials.filter(trial => trial.state === state && trial.curve.steps.length);
        if (!ended.length) continue;
        const lastFinite = trial => trial.curve[choice.loss].reduce((found, value, index) => (value === null ? found : index), -1);
        const places = ended.map(trial => [trial, lastFinite(trial)]).filter(([, index]) => index >= 0);
        traces.push({ ...common, mode: 'markers', name: `${state} here`, x: places.map(([trial, index]) => trial.curve[choice.x][index]),
          y: places.map(([trial, index]) => trial.curve[choice.loss][index]), customdata: places.map(([trial]) => trial.key), text: places.map(([trial]) => label(trial)),
          marker: { symbol, size: places.length > 200 ? 5 : 7, color: css(colour), opacity: crowd(places.length) } });
      }
      traces.reverse();
      remark(trials.length > BEST_IN_COLOUR ? `The best ${BEST_IN_COLOUR} are in colour.` : '');
      const ys = traces.flatMap(trace => trace.y).filter(value => value !== null && value > 0);
      let low = Infinity, high = 0;
      for (const y of ys) { low = Math.min(low, y); high = Math.max(high, y); }
      const log = high > 20 * low;
      return draw(traces, { xaxis: { title: { text: choice.x === 'steps' ? 'optimizer steps' : 'seconds of training' } },
        yaxis: { title: { text: title(choice.loss) }, type: log ? 'log' : 'linear', ...(log ? { dtick: 1, exponentformat: 'power' } : {}) } });
    },
  },

  /* Parallel coordinates: every searched knob and the metric. What is brushed filters the table and the other plots. */
  knobs: {
    draw() {
      const axes = parallelAxes(), ranges = brushes();
      const trials = byScore(shown(false)).filter(trial => axes.every(axis => axis.of(trial) !== null));
      const goal = axes.at(-1);
      const dimensions = axes.map(axis => {
        const dimension = { label: plain(title(axis.name)), name: axis.name, values: trials.map(trial => axis.of(trial) + spread(axis, trial, 0.2)) };
        const brushed = ranges.get(axis.name);
        if (brushed) {
          const kept = axis.names ? placesKept(axis, brushed) : (brushed.ranges || []).map(range => (axis.log ? range.map(end => Math.log10(Math.max(end, Number.MIN_VALUE))) : range));
          if (kept.length) dimension.constraintrange = kept.length > 1 ? kept : kept[0];
        }
        if (axis.names) Object.assign(dimension, { tickvals: axis.names.map((_, place) => place), ticktext: axis.names.map(name => plain(nameOf(axis, name, 24))), range: [-0.3, axis.names.length - 0.7] });
        else if (axis.log) Object.assign(dimension, fineTicks(axis));
        return dimension;
      });
      remark(`Drag along an axis to filter by it, also the table and the other plots; click the axis to let go.${shown(false).length > trials.length ? ` ${shown(false).length - trials.length} trials have no result yet, and no line.` : ''}`);
      // Plotly draws what has a larger number later: turned round, the best are on top.
      const values = trials.map(goal.of), turned = values.map(value => -value), { cmin, cmax } = colourEnds(values);
      return draw([{ type: 'parcoords', dimensions, line: { color: turned, colorscale: scale(), reversescale: true, showscale: false, ...(cmax === undefined ? {} : { cmin: -cmax, cmax: -cmin }) },
        labelfont: { size: 12, color: css('--text') }, tickfont: { size: 11, color: css('--dim') }, rangefont: { size: 1, color: 'rgba(0,0,0,0)' },
        unselected: { line: { color: css('--faint'), opacity: 0.25 } } }], { margin: { l: 90, r: 70, t: 45, b: 20 } });
    },
  },

  /* How much each searched knob matters, with what 90 % of resampled sweeps say. */
  importance: {
    draw() {
      const found = shownSweeps().filter(sweep => sweep.importance);
      const missing = shownSweeps().filter(sweep => !sweep.importance).map(sweep => sweep.name);
      const names = [...new Set(found.flatMap(sweep => sweep.importance.shares.map(share => share.knob)))].reverse();
      const traces = found.map(sweep => {
        const shares = new Map(sweep.importance.shares.map(share => [share.knob, share]));
        const of = pick => names.map(name => (shares.has(name) ? pick(shares.get(name)) : null));
        return { type: 'bar', orientation: 'h', name: plain(sweep.id), y: names.map(title), x: of(share => share.share), marker: { color: sweep.colour },
          error_x: { type: 'data', symmetric: false, array: of(share => share.high - share.share), arrayminus: of(share => share.share - share.low), color: css('--text'), thickness: 1.5 },
          customdata: of(share => [share.low, share.high]), hovertemplate: '%{y}: %{x:.0%} (90 % of resampled sweeps: %{customdata[0]:.0%} to %{customdata[1]:.0%})<extra></extra>' };
      });
      const told = found.map(sweep => `${sweep.id}: ${sweep.importance.method}, ${sweep.importance.trials} trials`).join('; ');
      const waiting = missing.length ? ` Not yet known: ${missing.join(', ')} (needs 8 ended trials whose results differ).` : '';
      remark(`${told}${told ? '. Bars: share of what tells the best tenth from the rest; lines: 90 % of resampled sweeps. Of all trials, whatever is filtered.' : ''}${waiting}`);
      return draw(traces, { xaxis: { tickformat: '.0%', range: [0, 1.02], title: { text: `share of ${title(metric())}` } }, yaxis: { automargin: true }, bargap: 0.35, showlegend: found.length > 1 });
    },
  },

  /* Quality against size: the trials that no smaller one beats. */
  size: {
    draw(trials) {
      const sized = trials.filter(trial => trial.adapter_parameters !== null && score(trial) !== null);
      const front = [];
      for (const trial of [...sized].sort((a, b) => a.adapter_parameters - b.adapter_parameters || score(a) - score(b))) if (!front.length || score(trial) < score(front.at(-1))) front.push(trial);
      const traces = shownSweeps().map(sweep => {
        const mine = sized.filter(trial => trial.sweep === sweep);
        return { type: 'scattergl', mode: 'markers', name: plain(sweep.id), x: mine.map(trial => trial.adapter_parameters), y: mine.map(score), customdata: mine.map(trial => trial.key),
          text: mine.map(label), hovertemplate: '%{text}<br>%{x:,} parameters<extra></extra>', marker: { size: 8, color: sweep.colour, opacity: 0.7 } };
      });
      traces.push({ type: 'scatter', mode: 'lines+markers', name: 'front', x: front.map(trial => trial.adapter_parameters), y: front.map(score), customdata: front.map(trial => trial.key),
        text: front.map(label), hovertemplate: '%{text}<br>%{x:,} parameters<extra></extra>', line: { color: css('--bad'), width: 1.5, shape: 'hv' }, marker: { size: 10, color: 'rgba(0,0,0,0)', line: { color: css('--bad'), width: 2 } } });
      remark(`The front: ${front.length} trials that no smaller adapter beats: ${front.map(trialName).join(', ')}.`);
      const scores = sized.map(score), log = scores.length > 0 && Math.min(...scores) > 0 && Math.max(...scores) > 20 * Math.min(...scores);
      return draw(traces, { xaxis: { type: 'log', title: { text: 'parameters of the adapter' }, exponentformat: 'SI' }, yaxis: { title: { text: title(metric()) }, type: log ? 'log' : 'linear', ...(log ? { dtick: 1, exponentformat: 'power' } : {}) } });
    },
  },

  /* Each pair of knobs against the metric: the best result of each cell, and the trials as points. */
  maps: {
    controls() {
      const names = mapAxes().map(axis => [axis.name, title(axis.name)]);
      return [chooser('mx', 'across', [['', 'all pairs'], ...names]), choice.mx ? chooser('my', 'up', [['', 'each other'], ...names.filter(([name]) => name !== choice.mx)]) : null];
    },
    draw(trials) {
      const axes = mapAxes(), { pairs, leftOut } = mapPairs(axes);
      const drawnAxes = new Set(pairs.flat());
      const done = byScore(trials).filter(trial => [...drawnAxes].every(axis => axis.of(trial) !== null));
      const scores = done.map(score), log = scores.length > 0 && Math.min(...scores) > 0 && Math.max(...scores) > 10 * Math.min(...scores);
      const goal = value => (log ? Math.log10(value) : value);
      const wide = at('plot').clientWidth > 760 ? 3 : at('plot').clientWidth > 480 ? 2 : 1, columns = Math.min(wide, pairs.length), rows = Math.ceil(pairs.length / Math.max(columns, 1));
      const traces = [], shape = { showlegend: false, annotations: [], margin: { l: 90, r: 90, t: 30, b: 50 }, coloraxis: { colorscale: scale(), ...colourEnds(scores.map(goal)), colorbar: { title: { text: `best ${title(metric())}` }, thickness: 12, ...(log ? ticks({ log, values: scores }) : {}) } } };
      pairs.forEach(([x, y], index) => {
        const place = index ? index + 1 : '', column = index % columns, line = Math.floor(index / columns);
        const gapX = 0.11, gapY = rows > 1 ? 0.2 / rows : 0, width = (1 - gapX * (columns - 1)) / columns, height = (1 - gapY * (rows - 1) * 1.6) / rows;
        const left = column * (width + gapX), top = 1 - line * (height + gapY * 1.6);
        shape[`xaxis${place}`] = { domain: [left, left + width], anchor: `y${place}`, title: { text: `${plain(title(x.name))} →`, standoff: 4 }, ...mapTicks(x) };
        shape[`yaxis${place}`] = { domain: [Math.max(0, top - height), top], anchor: `x${place}`, ...mapTicks(y) };
        shape.annotations.push({ text: `${plain(title(y.name))} ↑`, x: left, y: top, xref: 'paper', yref: 'paper', xanchor: 'right', yanchor: 'bottom', showarrow: false });
        const xs = cells(x), ys = cells(y), z = ys.map(() => xs.map(() => null)), names = ys.map(() => xs.map(() => ''));
        for (const trial of done) {
          const i = cellOf(x, trial, xs), j = cellOf(y, trial, ys);
          if (z[j][i] === null) { z[j][i] = goal(score(trial)); names[j][i] = label(trial); } // the best comes first
        }
        traces.push({ type: 'heatmap', x: xs, y: ys, z, text: names, coloraxis: 'coloraxis', xaxis: `x${place}`, yaxis: `y${place}`, hovertemplate: 'best here: %{text}<extra></extra>', hoverongaps: false, opacity: 0.85, xgap: 1, ygap: 1 });
        traces.push({ type: 'scattergl', mode: 'markers', x: done.map(trial => x.of(trial) + spread(x, trial, 0.6)), y: done.map(trial => y.of(trial) + spread(y, trial, 0.6)),
          xaxis: `x${place}`, yaxis: `y${place}`, customdata: done.map(trial => trial.key), text: done.map(label), hovertemplate: '%{text}<extra></extra>',
          marker: { size: done.length > 300 ? 3 : 6, color: done.map(trial => goal(score(trial))), coloraxis: 'coloraxis', line: { width: done.length > 300 ? 0.5 : 1, color: css('--ground') } } });
      });
      at('plot').style.height = rows > 1 ? `${rows * 250 + 40}px` : '';
      remark(`Colour: the best ${title(metric())} in each cell; points: trials.${leftOut ? ` Of ${axes.length} knobs, the pairs of the ${MOST_MAP_KNOBS} that matter most; choose one to see its others.` : ''}`);
      return draw(traces, shape);
    },
  },

  /* Several sweeps side by side, as a table: what differs is marked. */
  sweeps: {
    draw(trials) {
      clearPlot(true);
      const sweeps = shownSweeps(), fact = (text, of) => ({ text, values: sweeps.map(of) });
      const best = sweep => byScore(trials.filter(trial => trial.sweep === sweep))[0];
      const facts = [
        fact('state', sweep => sweep.state), fact('trials ended of those planned', sweep => {
          const mine = [...loom.trials.values()].filter(trial => trial.sweep === sweep);
          return `${mine.filter(trial => !['running', 'waiting'].includes(trial.state)).length} of ${sweep.planned}`;
        }),
        fact(`best ${title(metric())}`, sweep => (best(sweep) ? figure('eval_loss', score(best(sweep))) : '–')),
        fact('its trial', sweep => (best(sweep) ? best(sweep).name : '–')),
        ...knobs().map(knob => fact(`its ${title(knob.name)}`, sweep => (best(sweep) ? figure(knob.name, knobValue(best(sweep), knob.name)) : '–'))),
        fact('seconds', sweep => figure('', sweep.seconds)), fact('started', sweep => sweep.started_at), fact('base', sweep => sweep.base), fact('data', sweep => sweep.data),
        fact('steps of a trial', sweep => String(sweep.steps)), fact('searched', sweep => sweep.knobs.filter(knob => knob.searched).map(knob => knob.name).join(', ') || '–'),
        ...[...new Set(sweeps.flatMap(sweep => Object.keys(sweep.shared)))].map(name => fact(name, sweep => (name in sweep.shared ? String(sweep.shared[name]) : 'searched'))),
        ...[...new Set(sweeps.flatMap(sweep => Object.keys(sweep.versions)))].map(name => fact(`${name} (version)`, sweep => sweep.versions[name] || '–')),
        fact('folder', sweep => sweep.folder),
      ];
      const head = el('tr', {}, el('th', {}), ...sweeps.map(sweep => el('th', {}, el('span', { class: 'swatch', style: `display:inline-block;background:${sweep.colour}` }), ` ${sweep.id}`)));
      at('plot').append(el('table', { class: 'facts', id: 'sides' }, el('thead', {}, head), el('tbody', {}, ...facts.map(({ text, values }) =>
        el('tr', { class: new Set(values).size > 1 && 'differs' }, el('th', { scope: 'row' }, text), ...values.map(value => el('td', {}, value)))))));
      remark(sweeps.length > 1 ? 'Marked: what differs.' : 'One sweep: open more of them to see what differs.');
    },
  },
};

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
  const low = Math.min(...axis.values), high = Math.max(...axis.values), few = [...new Set(axis.values)].sort((a, b) => a - b);
  let marks = few;
  if (few.length > 6) {
    const steps = Math.log10(high / low) > 2.5 ? [1] : [1, 2, 5];
    marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) for (const step of steps) marks.push(step * 10 ** power);
    marks = marks.filter(mark => mark >= low * 0.999 && mark <= high * 1.001);
    if (marks.length < 2) marks = [low, high];
  }
  return { tickvals: marks.map(Math.log10), ticktext: marks.map(mark => figure('', +mark.toPrecision(2))) };
}

/** The same for parallel coordinates, whose brushes snap to ticks: between those with a text lie many whose text is not seen (each another: Plotly takes equal texts for one tick). */
function fineTicks(axis) {
  const { tickvals, ticktext } = ticks(axis), ends = axis.values.map(Math.log10), low = Math.min(...ends), high = Math.max(...ends);
  const texts = new Map();
  for (let index = 0; index <= FINE; index++) texts.set(low + (index * (high - low)) / FINE, '\u200b'.repeat(index + 1));
  tickvals.forEach((value, index) => texts.set(value, ticktext[index]));
  const all = [...texts].sort(([a], [b]) => a - b);
  return { tickvals: all.map(([value]) => value), ticktext: all.map(([, text]) => text) };
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

const BINS = 8;
const FINE = 60;
/** Where a map's cells have their middle. */
function cells(axis) {
  if (axis.names) return axis.names.map((_, place) => place);
  const ends = axis.values.map(value => (axis.log ? Math.log10(value) : value)), low = Math.min(...ends), high = Math.max(...ends);
  return Array.from({ length: BINS }, (_, index) => low + ((index + 0.5) * (high - low)) / BINS);
}
function cellOf(axis, trial, middles) {
  const place = axis.of(trial);
  return axis.names ? place : Math.max(0, Math.min(BINS - 1, Math.round((place - middles[0]) / (middles[1] - middles[0]))));
}
function mapTicks(axis) {
  if (axis.names) return { tickvals: cells(axis), ticktext: axis.names.map(name => plain(nameOf(axis, name, 14))), automargin: true };
  return { ...ticks(axis), zeroline: false };
}
function nameOf(axis, name, most) {
  const text = axis.numeric ? figure(axis.name, Number(name)) : name;
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
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
  return axis.names.flatMap((name, place) => (test(axis.numeric && brush.ranges ? Number(name) : name) ? [[place - 0.25, place + 0.25]] : []));
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
    if (!list.length) ranges.delete(axis.name);
    else ranges.set(axis.name, names ? { names } : { ranges: list.map(([low, high]) => [outward(axis, low, -1), outward(axis, high, 1)]) });
  }
  loom.brushing = true;
  choose({ brush: brushText(ranges) }, true);
}
