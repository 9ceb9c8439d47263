'use strict';
/* How values are written, and elements that hold them. */

function figure(name, value) {
  if (value === undefined || (value === null && !knobs().some(knob => knob.name === name))) return '–';
  if (typeof value !== 'number') return String(value);
  if (COLUMNS[name]?.loss) return value.toFixed(4);
  if (name === 'adapter_parameters') return value.toLocaleString('en-US');
  if (name === 'tokens_per_second') return Math.round(value).toLocaleString('en-US');
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : String(+value.toPrecision(4));
}

/** A name on an axis, no longer than `most`. */
function nameOf(axis, name, most) {
  const text = axis.numeric ? figure(axis.name, Number(name)) : name;
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
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
