'use strict';
/* A trial's page: numbers, curves, the whole configuration, and commands to copy. */

function renderTrial() {
  const trial = loom.trials.get(choice.trial), place = at('trial');
  if (!trial) {
    place.replaceChildren(el('p', {}, `No trial ${choice.trial} here. `, backButton()));
    return;
  }
  const pinned = loom.trials.get(choice.pin);
  const other = pinned && pinned !== trial ? pinned : null;
  place.replaceChildren(
    el('p', {}, backButton()),
    el('h2', {}, `${trial.name} of `, trial.sweep.name),
    el('div', { class: 'halves' },
      el('div', {},
        el('div', { class: 'curve', id: 'trial-curve' }),
        failure(trial),
        ...trialCommands(trial)),
      el('div', { class: 'columns3' },
        el('div', {},
          el('h3', {}, 'Result'),
          numbersTable(trial, other),
          bestCheckpoint(trial)),
        el('div', {},
          el('h3', {}, 'Configuration'),
          configurationTable(trial, other)))));
  drawTrialCurves(trial, other);
}

function failure(trial) {
  if (!trial.error) return null;
  return el('div', {},
    el('h3', {}, 'Why it failed'),
    el('pre', {}, trial.error));
}

function trialCommands(trial) {
  const unpublished = trial.adapter
    ? 'The folder is a copy: copy it to a disk to publish from it.'
    : 'It has no adapter: it left none, or the sweep keeps those of its best trials only (search.keep_adapters).';
  return [
    el('h3', {}, 'Train it again, alone'),
    command(trial.reproduce, 'The folder is a copy: copy it to a disk to train a trial of it again.'),
    el('h3', {}, 'Publish it'),
    command(trial.publish, unpublished),
    el('h3', {}, 'Checkpoint'),
    command(trial.adapter, 'none'),
  ];
}

/** The numbers of a trial, its losses beside those of the pinned one, if any. */
function numbersTable(trial, other) {
  const names = ['state', 'steps', 'train_loss', 'eval_loss', 'tokens_per_second', 'adapter_parameters'];
  const rows = names.map(name => {
    const { loss, of } = column(name), value = of(trial);
    return el('tr', {},
      el('th', { scope: 'row' }, name.replaceAll('_', ' ')),
      el('td', { class: name === 'state' ? `state-${trial.state}` : null },
        figure(name, value),
        other && loss ? delta(value, of(other)) : null));
  });
  return el('table', { class: 'facts' }, el('tbody', {}, ...rows));
}

function bestCheckpoint(trial) {
  if (trial.best_steps === null || trial.best_steps === trial.steps) return null;
  return el('p', { class: 'dim' }, `Losses are those of its best checkpoint, after ${trial.best_steps} steps.`);
}

/** A trial's own settings, by name, its sweep's base and data, the packages. */
function settingsOf({ config, sweep }) {
  const versions = Object.entries(sweep.versions).map(([name, version]) => [`${name} (version)`, version]);
  return { ...config, ...sweep.settings, ...Object.fromEntries(versions) };
}

/** The whole configuration of a trial; beside it, where there is a pinned one, what differs there. */
function configurationTable(trial, other) {
  const own = settingsOf(trial), others = other ? settingsOf(other) : {};
  const rows = Object.keys({ ...own, ...others }).map(name => {
    const differs = other && JSON.stringify(others[name]) !== JSON.stringify(own[name]);
    return el('tr', { class: differs && 'differs' },
      el('th', { scope: 'row' }, name),
      settingCell(own[name]),
      other && (differs ? settingCell(others[name]) : el('td')));
  });
  return el('table', { class: 'facts', id: 'config' }, comparedHead(trial, other), el('tbody', {}, ...rows));
}

/** Numbers are rounded, and tell all their digits to who points at them; a path may be broken into lines, they not. */
function settingCell(value) {
  const whole = shownValue(value), text = typeof value === 'number' ? figure('', value) : whole;
  return el('td', { class: text.length < 24 && 'short', title: text !== whole && whole }, text);
}

function comparedHead(trial, other) {
  if (!other) return null;
  return el('thead', {}, el('tr', {},
    el('th'),
    el('th', {}, trial.name),
    el('th', {}, `pinned: ${other.key}`)));
}

function drawTrialCurves(trial, other) {
  const losses = [['eval_loss', 'evaluation', PALETTE[0]], ['train_loss', 'training', PALETTE[1]]];
  const lines = losses.map(([name, words, colour]) => ({
    x: trial.curve.steps, y: trial.curve[name], name: words, mode: 'lines+markers', line: { color: colour },
    hovertemplate: `%{x}: %{y:.4f}<extra>${words}</extra>`,
  }));
  if (other) {
    lines.push({
      x: other.curve.steps, y: other.curve.eval_loss, name: plain(`${other.key}, evaluation`), mode: 'lines',
      line: { color: css('--dim'), dash: 'dash' },
    });
  }
  const shape = layout({
    margin: { l: 50, r: 10, t: 10, b: 40 },
    xaxis: { title: { text: 'optimizer steps' } },
    yaxis: { title: { text: 'loss' } },
    legend: { orientation: 'h', y: 1.15 },
  });
  Plotly.newPlot(at('trial-curve'), lines, shape, CONFIG);
}

function shownValue(value) {
  if (value === undefined) return '–';
  return Array.isArray(value) ? value.join(', ') : String(value);
}

function backButton() {
  const onclick = () => choose({ trial: '' });
  return el('button', { type: 'button', id: 'back', onclick }, '← all trials');
}

function command(text, otherwise, before) {
  if (!text) return el('p', { class: 'dim' }, otherwise);
  return el('div', { class: 'command' },
    before && el('span', {}, before),
    el('code', {}, text),
    copyButton('copy', () => text));
}

function copyButton(words, text) {
  const button = el('button', { type: 'button' }, words);
  button.addEventListener('click', async () => {
    let isCopied = true;
    try {
      await navigator.clipboard.writeText(text());
    } catch { // an embedded page may not, without being asked
      const field = el('textarea', {}, text());
      document.body.append(field);
      field.select();
      isCopied = document.execCommand('copy');
      field.remove();
      button.focus();
    }
    button.textContent = isCopied ? 'copied' : 'not copied';
    setTimeout(() => { button.textContent = words; }, 1500);
  });
  return button;
}
