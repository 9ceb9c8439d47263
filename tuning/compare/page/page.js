'use strict';
/* Puts the parts together: draws what the choice says, and asks for what is new. */

const ASK_EVERY_MS = 2000;
const FILTER_AFTER_MS = 120;
const params = new URLSearchParams(location.search);
const drawn = { view: '', wanted: '', soon: 0, trial: '', isHeld: false };
let failures = 0;

loom.render = () => {
  if (loom.scheduled) return;
  loom.scheduled = true;
  requestAnimationFrame(() => {
    loom.scheduled = false;
    unpressed(render);
  });
};

function render() {
  const theme = choice.theme || params.get('theme')
    || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  const themed = document.documentElement.dataset.theme === theme;
  document.documentElement.dataset.theme = theme;
  at('theme').textContent = theme === 'dark' ? 'light' : 'dark';
  renderSweeps();
  renderFilters();
  renderTable();
  const opened = Boolean(choice.trial);
  at('panel').hidden = opened;
  at('trial').hidden = !opened;
  if (opened) showTrial(theme);
  else renderView(themed);
  document.title = `${shownSweeps().map(sweep => sweep.name).join(', ') || 'no sweeps'} · loraloom`;
}

function renderSweeps() {
  const off = listed(choice.off);
  const shows = [loom.sweeps.map(sweep => [sweep.id, sweep.folder, sweepState(sweep)]), choice.off];
  fill(at('sweeps'), shows, () => loom.sweeps.map(sweep => el('span', { class: 'sweep', title: sweep.folder },
    el('label', {},
      el('input', {
        type: 'checkbox', checked: !off.has(sweep.id), 'data-sweep': sweep.id, 'data-held': sweep.id,
        onchange: () => toggle('off', sweep.id),
      }),
      el('span', { class: 'swatch', style: `background:${sweep.colour}` }),
      el('span', {}, sweep.id),
      el('span', { class: 'dim' }, sweepState(sweep))),
    loom.sweeps.length > 1 ? onlyButton(sweep) : null)));
  const apart = incomparable();
  at('apart').hidden = !apart.length;
  at('apart').textContent = `These sweeps differ in ${apart.join(', ')}: their losses may not compare.`;
  const troubled = loom.sweeps.filter(sweep => sweep.trouble);
  const troubles = [...loom.troubles, ...troubled.map(sweep => `${sweep.id}: ${sweep.trouble}`)];
  at('troubles').hidden = !troubles.length;
  at('troubles').textContent = troubles.join('\n');
  at('left').hidden = !loom.left_out.length;
  at('left').textContent = loom.left_out.join(' ');
  const left = shownSweeps().filter(sweep => sweep.resume);
  at('resume').hidden = !left.length;
  fill(at('resume'), left.map(sweep => sweep.resume), () => left.map(sweep =>
    command(sweep.resume, '', `${sweep.id} was interrupted. To go on:`)));
}

function onlyButton({ id }) {
  const others = loom.sweeps.filter(sweep => sweep.id !== id).map(sweep => sweep.id);
  const onclick = () => choose({ off: toText(new Set(others)) });
  const hints = { class: 'only', title: 'show no other sweep', 'data-only': id, 'data-held': `only ${id}` };
  return el('button', { type: 'button', ...hints, onclick }, 'only');
}

function renderFilters() {
  if (document.activeElement !== at('query')) at('query').value = choice.q;
  const chip = (words, work) => el('button', { type: 'button', title: 'let go', onclick: work }, `${words} ✕`);
  const chips = [...brushes()].map(([name]) => chip(`brush: ${title(name)}`, () => {
    const left = brushes();
    left.delete(name);
    choose({ brush: brushText(left) });
  }));
  const hidden = listed(choice.hide).size;
  if (hidden) chips.push(chip(`${hidden} hidden`, () => choose({ hide: '' })));
  if (choice.pin) chips.push(chip(`pinned: ${choice.pin}`, () => choose({ pin: '' })));
  const unknown = unknownColumns().map(name => el('span', { class: 'unknown' }, `no column ${name}`));
  at('chips').replaceChildren(...chips, ...unknown);
}

function renderView(themed) {
  fill(at('views'), choice.view, () => Object.entries(VIEWS).map(([name, words]) => el('button', {
    type: 'button', role: 'tab', 'data-view': name, 'data-held': name, 'aria-selected': String(name === choice.view),
    onclick: () => choose({ view: name, trial: '' }),
  }, words)));
  const view = views[choice.view], { x, loss, mx, my } = choice;
  const offered = choice.view === 'maps' && mapAxes().map(axis => axis.name);
  fill(at('controls'), [choice.view, x, loss, mx, my, offered], () => (view.controls ? view.controls() : []));
  // What no plot shows does not draw it anew; neither does a brush where it is drawn, which is in the middle of moving.
  const { sort, down, cols, trial, brush, ...seen } = choice;
  const brushed = choice.view === 'knobs' && loom.brushing ? '' : brush;
  const wanted = JSON.stringify([seen, brushed, loom.news, innerWidth < NARROW_PX]);
  if (loom.brushing) drawn.wanted = wanted;
  loom.brushing = false;
  if (drawn.wanted === wanted && themed) return;
  // The table answers at once, the plot right after; not under a hand that is drawing a brush.
  clearTimeout(drawn.soon);
  drawn.soon = setTimeout(() => {
    if (drawn.isHeld && drawn.view === choice.view) return renderView(themed);
    if (drawn.view !== choice.view || !themed) {
      clearPlot(false);
      Object.assign(at('plot').style, { height: '', minWidth: '' });
    }
    Object.assign(drawn, { view: choice.view, wanted });
    views[choice.view].draw(shown());
  }, drawn.isHeld ? 300 : 0);
}

/** A trial's page, where something on it has changed. */
function showTrial(theme) {
  const known = key => (loom.trials.has(key) ? [key, loom.trials.get(key).news] : key);
  const wanted = JSON.stringify([known(choice.trial), known(choice.pin), theme, innerWidth < NARROW_PX]);
  if (drawn.trial === wanted) return;
  drawn.trial = wanted;
  const old = at('trial-curve');
  if (old) Plotly.purge(old);
  renderTrial();
}

/** What is told of sweeps beside their trials. */
const ofSweeps = sweeps => JSON.stringify(sweeps.map(sweep => ({ ...sweep, trials: null, colour: null })));

async function ask() {
  try {
    const query = loom.revision ? `?after=${encodeURIComponent(loom.revision)}` : '';
    const answer = await fetch(`data.json${query}`, { cache: 'no-store' });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const told = await answer.json();
    const before = ofSweeps(loom.sweeps);
    const news = told.whole || told.sweeps.some(sweep => sweep.trials) || ofSweeps(told.sweeps) !== before
      || JSON.stringify([told.troubles, told.left_out]) !== JSON.stringify([loom.troubles, loom.left_out]);
    take(told);
    failures = 0;
    at('live').className = '';
    const isRunning = loom.sweeps.some(sweep => sweep.state === 'running' && !sweep.last_news_at);
    at('live').textContent = isRunning ? 'live' : '';
    if (news) {
      loom.news += 1;
      loom.render();
    }
  } catch (error) {
    failures += 1;
    at('live').className = 'lost';
    at('live').textContent = `not up to date: ${error.message}`;
  }
  if (!loom.live && !failures) return;
  const times = document.hidden ? 5 : Math.min(failures + 1, 5);
  setTimeout(ask, times * ASK_EVERY_MS);
}

function listen() {
  at('plot').addEventListener('pointerdown', () => { drawn.isHeld = true; });
  for (const end of ['pointerup', 'pointercancel', 'mouseup']) {
    window.addEventListener(end, () => { drawn.isHeld = false; });
  }
  let waiting = 0;
  const forget = () => {
    clearTimeout(waiting);
    waiting = 0;
  };
  const filter = () => {
    forget();
    choose({ q: at('query').value }, true);
  };
  at('query').addEventListener('input', () => {
    forget();
    waiting = setTimeout(filter, FILTER_AFTER_MS);
  });
  at('query').addEventListener('change', () => { if (waiting) filter(); }); // the hand has gone elsewhere before
  at('filters').addEventListener('submit', event => event.preventDefault());
  at('theme').addEventListener('click', () => {
    const isDark = document.documentElement.dataset.theme === 'dark';
    choose({ theme: isDark ? 'light' : 'dark' }, true);
  });
  at('home').addEventListener('click', event => {
    event.preventDefault();
    choose({ ...DEFAULTS, theme: choice.theme });
  });
  let framed = 0;
  at('scroller').addEventListener('scroll', () => {
    framed = framed || requestAnimationFrame(() => {
      framed = 0;
      unpressed(renderRows);
    });
  });
  for (const move of ['popstate', 'hashchange']) {
    window.addEventListener(move, () => {
      forget();
      readAddress();
      at('query').value = choice.q;
      loom.render();
    });
  }
  new ResizeObserver(() => unpressed(renderRows)).observe(at('scroller'));
}

function start() {
  readAddress();
  const inRay = /^\/([\w-]+\/)?d\//.test(location.pathname) && !at('data');
  at('note').hidden = !inRay;
  const words = inRay
    ? 'Copy the address of this view, outside of Ray\'s dashboard. It works as long as this Ray runs and where its port'
      + ' is reached, and shows the page to whoever has it: its secret is in it.'
    : at('link').title;
  at('link').replaceWith(Object.assign(copyButton('copy link', () => location.href), { id: 'link', title: words }));
  listen();
  const kept = at('data');
  if (kept) {
    take(JSON.parse(kept.textContent));
    loom.render();
  } else ask();
}

start();
