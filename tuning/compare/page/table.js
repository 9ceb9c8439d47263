'use strict';
/* The table of trials. Only the rows in sight are in the page, so that thousands cost no more than thirty. */

const ROW_PX = 28;
const table = { rows: [], names: [] };

function renderTable() {
  const hiddenColumns = listed(choice.cols);
  table.names = columnNames().filter(name => !hiddenColumns.has(name));
  const pinned = loom.trials.get(choice.pin);
  table.rows = sorted(shown());
  if (pinned) table.rows = [pinned, ...table.rows.filter(trial => trial !== pinned)];
  renderHead();
  renderColumnMenu();
  renderRows();
  const all = [...loom.trials.values()].filter(trial => !listed(choice.off).has(trial.of)).length;
  const many = shown().length;
  const written = number => number.toLocaleString('en-US');
  at('count').textContent = many === all ? `${written(all)} trials` : `${written(many)} of ${written(all)} trials`;
}

function renderHead() {
  const by = choice.sort || metric();
  fill(at('scroller').querySelector('thead'), [table.names, by, choice.down], () => {
    const cells = table.names.map(name => {
      const { hint, number, title: words } = column(name);
      const arrow = name === by ? (choice.down ? ' ▼' : ' ▲') : '';
      const sort = () => choose({ sort: name, down: name === by && !choice.down ? '1' : '' });
      const order = name === by && (choice.down ? 'descending' : 'ascending');
      const button = { type: 'button', onclick: sort, title: hint ? `${name}, ${hint}` : name, 'data-held': name };
      return el('th', { class: number && 'number', 'aria-sort': order, 'data-column': name },
        el('button', button, words + arrow));
    });
    return [el('tr', {}, el('th', { 'aria-label': 'actions' }), ...cells)];
  });
}

function renderColumnMenu() {
  const off = listed(choice.cols);
  fill(at('columns').querySelector('div'), [columnNames(), [...off]], () => columnNames().map(name => el('label', {},
    el('input', {
      type: 'checkbox', checked: !off.has(name), 'data-held': name, onchange: () => toggle('cols', name),
    }),
    ` ${name}`)));
}

/** The rows in sight, between two empty ones as high as all the others. */
function renderRows() {
  const scroller = at('scroller'), pinned = loom.trials.get(choice.pin);
  const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_PX) - 10);
  const last = Math.min(table.rows.length, first + Math.ceil(scroller.clientHeight / ROW_PX) + 20);
  const spacer = count => el('tr', { class: 'spacer' },
    el('td', { colspan: table.names.length + 1, style: `height:${count * ROW_PX}px` }));
  const body = table.rows.slice(first, last);
  const shows = [
    first, table.rows.length, table.names, pinned?.key, pinned?.news, body.map(trial => [trial.key, trial.news]),
  ];
  fill(scroller.querySelector('tbody'), shows, () => [
    spacer(first),
    ...body.map(trial => row(trial, pinned)),
    spacer(table.rows.length - last),
  ]);
}

function row(trial, pinned) {
  const isPinned = trial === pinned;
  const act = (text, title, pressed, work) => {
    const onclick = event => {
      event.stopPropagation();
      work();
    };
    return el('button', { type: 'button', title, 'aria-pressed': pressed, onclick }, text);
  };
  const pin = () => choose({ pin: isPinned ? '' : trial.key });
  const acts = el('span', { class: 'acts' },
    act('pin', 'compare all others with this one', isPinned ? 'true' : 'false', pin),
    act('hide', 'leave this trial out', null, () => toggle('hide', trial.key)));
  const open = () => choose({ trial: trial.key });
  const onkeydown = event => {
    if (event.key === 'Enter' && event.target === event.currentTarget) open();
  };
  const attributes = {
    'data-key': trial.key, 'data-held': trial.key, class: isPinned && 'pinned', tabindex: 0, onclick: open, onkeydown,
  };
  return el('tr', attributes,
    el('td', {}, acts),
    ...table.names.map(name => cell(trial, name, pinned)));
}

function cell(trial, name, pinned) {
  const cells = column(name), value = cells.of(trial);
  const text = figure(name, value);
  const compared = pinned && trial !== pinned;
  const classes = [cells.number ? 'number' : '', name === 'state' ? `state-${trial.state}` : ''];
  if (compared && cells.knob && value !== cells.of(pinned)) classes.push('differs');
  const swatch = name === 'sweep'
    ? el('span', { class: 'swatch', style: `display:inline-block;background:${trial.sweep.colour}` })
    : null;
  return el('td', { class: classes.join(' ').trim() || null, title: text, 'data-column': name },
    swatch,
    swatch ? ' ' : null,
    text,
    compared && cells.loss ? delta(value, cells.of(pinned)) : null);
}

/** A loss beside that of the pinned trial: lower is better. */
function delta(value, reference) {
  if (value === null || reference === null) return null;
  const by = value - reference;
  const verdict = by < 0 ? 'better' : by > 0 ? 'worse' : '';
  return el('span', { class: `delta ${verdict}` }, (by < 0 ? '−' : '+') + Math.abs(by).toFixed(4));
}
