'use strict';
/* The plots: each view lays out the traces (traces.js) of the trials that are shown, and Plotly draws them. */

const BEST_IN_COLOUR = 10;
const PALETTE = [
  '#1f77b4', '#e4722e', '#2a9d5c', '#c2413b', '#7a5cc7', '#8c6d1f', '#c45aa0', '#0e9aa7', '#6b8e23', '#4a6fa5',
];
/** Low is good: dark in the light theme, bright in the dark one. */
const SCALE = {
  light: [[0, '#0b3d91'], [0.25, '#2f7fc1'], [0.5, '#62b8b0'], [0.75, '#c9cf6a'], [1, '#e7c9a0']],
  dark: [[0, '#f6e27f'], [0.25, '#8fd694'], [0.5, '#3fa7b5'], [0.75, '#3b6aa8'], [1, '#4b4274']],
};
const NARROW_PX = 720;
const LEAST_AXIS_PX = 100;
/** Of fewer, one tenth is a handful at most. */
const FEW_TRIALS = 30;
/** Lines of more trials are left to WebGL. */
const MOST_IN_SVG = 300;

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const scale = () => SCALE[document.documentElement.dataset.theme === 'dark' ? 'dark' : 'light'];

function layout(more) {
  const axis = { gridcolor: css('--line'), zerolinecolor: css('--line'), linecolor: css('--line') };
  const merged = {
    paper_bgcolor: css('--ground'), plot_bgcolor: css('--ground'), font: { color: css('--text'), size: 12 },
    autosize: true, margin: { l: 60, r: 20, t: 20, b: 45 },
    hoverlabel: {
      align: 'left', bgcolor: css('--raised'), bordercolor: css('--line'), font: { color: css('--text') },
    },
    legend: { orientation: 'v', font: { size: 11 } }, hovermode: 'closest', uirevision: choice.view, ...more,
  };
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
  const onchange = event => choose({ [name]: event.target.value });
  return el('label', {}, text, el('select', { 'data-choice': name, onchange },
    ...options.map(([value, words]) => option(value, words, choice[name]))));
}

const views = {
  /* Loss curves laid over each other. The best are in colour, the others one faint trace with gaps. */
  curves: {
    controls: () => [
      chooser('x', 'by', [['steps', 'step'], ['seconds', 'time']]),
      chooser('loss', 'loss', [['eval_loss', 'evaluation'], ['train_loss', 'training']]),
    ],
    draw(trials) {
      const colours = curveColours(trials);
      const faint = trials.filter(trial => !colours.has(trial));
      // What comes later lies on top: the faint ones, curves in colour with the best last, the ends.
      const lines = [...colours].map(([trial, colour]) => curveTrace(trial, colour)).reverse();
      const traces = [...faintCurves(faint), ...lines, ...curveEnds(trials)];
      remark(trials.length > BEST_IN_COLOUR ? `The best ${BEST_IN_COLOUR} are in colour.` : '');
      const losses = traces.flatMap(trace => trace.y).filter(value => value !== null);
      return draw(traces, {
        xaxis: { title: { text: choice.x === 'steps' ? 'optimizer steps' : 'seconds of training' } },
        yaxis: lossAxis(choice.loss, losses.filter(value => value > 0)),
        legend: { font: { size: 11 }, traceorder: 'reversed' },
      });
    },
  },

  /* Parallel coordinates: every searched knob and the metric. What is brushed filters the table and the other plots. */
  knobs: {
    draw() {
      const axes = parallelAxes(), all = shown(false);
      const trials = byScore(all).filter(trial => axes.every(axis => axis.of(trial) !== null));
      const lineless = all.length - trials.length;
      remark('Drag along an axis to filter by it, also the table and the other plots; click the axis to let go.'
        + (lineless ? ` ${lineless} trials have no result, and no line.` : ''));
      // Plotly draws what has a larger number later: turned round, the best are on top.
      const values = trials.map(axes.at(-1).of), { cmin, cmax } = colourEnds(values);
      const line = { color: values.map(value => -value), colorscale: scale(), reversescale: true, showscale: false };
      if (cmax !== undefined) Object.assign(line, { cmin: -cmax, cmax: -cmin });
      const trace = {
        type: 'parcoords', dimensions: axes.map(axis => parallelDimension(axis, trials)), line,
        labelfont: { size: 12, color: css('--text') }, tickfont: { size: 11, color: css('--dim') },
        rangefont: { size: 1, color: 'rgba(0,0,0,0)' },
        unselected: { line: { color: css('--faint'), opacity: 0.25 } },
      };
      // Axes need room for their names: on a narrow screen the plot is wider than that, and scrolls.
      at('plot').style.minWidth = `${axes.length * LEAST_AXIS_PX}px`;
      return draw([trace], { margin: { l: 90, r: 70, t: 45, b: 20 } });
    },
  },

  /* How much each searched knob matters, with what 90 % of resampled sweeps say. */
  importance: {
    draw() {
      const found = shownSweeps().filter(sweep => sweep.importance);
      const missing = shownSweeps().filter(sweep => !sweep.importance).map(sweep => sweep.name);
      const names = [...new Set(found.flatMap(sweep => sweep.importance.shares.map(share => share.knob)))].reverse();
      const told = found.map(sweep => `${sweep.id}: ${sweep.importance.method}, ${sweep.importance.trials} trials`);
      const meaning = '. Bars: share of what tells the best tenth from the rest; lines: 90 % of resampled sweeps.'
        + ' Of all that ended, whatever is filtered: stopped ones with the loss that they had, diverged ones last.'
        + (found.some(sweep => sweep.importance.trials < FEW_TRIALS) ? ' Of so few trials, a hint at most.' : '');
      const waiting = ` Not yet known: ${missing.join(', ')} (needs 8 ended trials whose results differ).`;
      remark((told.length ? told.join('; ') + meaning : '') + (missing.length ? waiting : ''));
      return draw(found.map(sweep => shareBars(sweep, names)), {
        xaxis: { tickformat: '.0%', range: [0, 1.02], title: { text: `importance for ${title(metric())}` } },
        yaxis: { automargin: true }, bargap: 0.35, showlegend: found.length > 1,
      });
    },
  },

  /* Quality against size: the trials that no smaller one beats. */
  size: {
    draw(trials) {
      const sized = trials.filter(trial => trial.adapter_parameters !== null && score(trial) !== null);
      const front = sizeFront(sized);
      const traces = shownSweeps().map(sweep => {
        const its = sized.filter(trial => trial.sweep === sweep);
        const symbol = its.map(trial => (trial.state === 'finished' ? 'circle' : 'x'));
        return {
          ...sizePoints(its), type: 'scattergl', mode: 'markers', name: plain(sweep.id),
          marker: { size: 8, color: sweep.colour, opacity: 0.7, symbol },
        };
      });
      traces.push({
        ...sizePoints(front), type: 'scatter', mode: 'lines+markers', name: 'front',
        line: { color: css('--bad'), width: 1.5, shape: 'hv' },
        marker: { size: 10, color: 'rgba(0,0,0,0)', line: { color: css('--bad'), width: 2 } },
      });
      const names = front.map(trialName).join(', ');
      remark(`The front: ${front.length} trials that no smaller adapter beats: ${names}.`
        + ' Crosses were not trained to the end.');
      const scores = sized.map(score);
      return draw(traces, {
        xaxis: { type: 'log', title: { text: 'parameters of the adapter' }, exponentformat: 'SI' },
        yaxis: lossAxis(metric(), scores.every(value => value > 0) ? scores : []),
      });
    },
  },

  /* Each pair of knobs against the metric: the best result of each cell, and the trials as points. */
  maps: {
    controls() {
      const names = mapAxes().map(axis => [axis.name, title(axis.name)]);
      const others = names.filter(([name]) => name !== choice.mx);
      return [
        chooser('mx', 'across', [['', 'all pairs'], ...names]),
        choice.mx ? chooser('my', 'up', [['', 'each other'], ...others]) : null,
      ];
    },
    draw(trials) {
      const axes = mapAxes(), { pairs, leftOut } = mapPairs(axes);
      const done = byScore(trials), goal = mapGoal(done), grid = mapGrid(pairs.length);
      const traces = [], shape = {
        showlegend: false, annotations: [], coloraxis: goal.coloraxis,
        margin: { l: 90, r: innerWidth < NARROW_PX ? 15 : 90, t: 30, b: 50 },
      };
      pairs.forEach(([x, y], index) => {
        const place = index ? index + 1 : '', { left, right, bottom, top } = grid.place(index);
        const xTitle = { text: `${plain(title(x.name))} →`, standoff: 4 };
        shape[`xaxis${place}`] = { domain: [left, right], anchor: `y${place}`, title: xTitle, ...mapTicks(x) };
        shape[`yaxis${place}`] = { domain: [bottom, top], anchor: `x${place}`, ...mapTicks(y) };
        shape.annotations.push({
          text: `${plain(title(y.name))} ↑`, x: left, y: top, xref: 'paper', yref: 'paper', xanchor: 'right',
          yanchor: 'bottom', showarrow: false,
        });
        const here = { coloraxis: 'coloraxis', xaxis: `x${place}`, yaxis: `y${place}` };
        const placed = done.filter(trial => x.of(trial) !== null && y.of(trial) !== null);
        traces.push(mapCells(x, y, placed, goal.of, here), mapPoints(x, y, placed, goal.of, here));
      });
      at('plot').style.height = grid.rows > 1 ? `${grid.rows * 250 + 40}px` : '';
      remark(`Colour: the best ${title(metric())} in each cell; points: trials.${leftOut
        ? ` Of ${axes.length} knobs, the pairs of the ${MOST_MAP_KNOBS} that matter most; choose one to see its others.`
        : ''}`);
      return draw(traces, shape);
    },
  },

  /* Several sweeps side by side, as a table: what differs is marked. */
  sweeps: {
    draw(trials) {
      clearPlot(true);
      const sweeps = shownSweeps();
      const swatch = sweep => el('span', { class: 'swatch', style: `display:inline-block;background:${sweep.colour}` });
      const heads = sweeps.map(sweep => el('th', {}, swatch(sweep), ` ${sweep.id}`));
      const rows = sweepFacts(sweeps, trials).map(({ text, values }) => el('tr',
        { class: new Set(values).size > 1 && 'differs' },
        el('th', { scope: 'row' }, text), ...values.map(value => el('td', {}, value))));
      at('plot').append(el('table', { class: 'facts', id: 'sides' },
        el('thead', {}, el('tr', {}, el('th', {}), ...heads)), el('tbody', {}, ...rows)));
      remark(sweeps.length > 1 ? 'Marked: what differs.' : 'One sweep: open more of them to see what differs.');
    },
  },
};
