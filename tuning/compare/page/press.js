'use strict';
/* A press is a click only where the element is still there when the hand lets go: until then none is made anew. */

const press = { isDown: false, end: 0, late: new Set() };
const PRESSED = 'button, label, summary, tr';
const TAP_MS = 300;

/** Do it now, or as soon as the hand has let go. */
function unpressed(work) {
  if (press.isDown) press.late.add(work);
  else work();
}

function letGo(afterMs = 0) {
  if (!press.isDown) return;
  clearTimeout(press.end);
  press.end = setTimeout(() => {
    press.isDown = false;
    const late = [...press.late];
    press.late.clear();
    for (const work of late) work();
  }, afterMs);
}

// What is pressed beside, by another finger, changes nothing; a select's list may keep its end for itself.
window.addEventListener('pointerdown', ({ button, target }) => {
  if (button !== 0 || !target.closest?.(PRESSED) || target.closest('select')) return;
  clearTimeout(press.end);
  press.isDown = true;
}, true);
// A mouse's click comes with its release, a finger's some time after it, or not at all.
window.addEventListener('pointerup', event => letGo(event.pointerType === 'mouse' ? 0 : TAP_MS), true);
window.addEventListener('click', () => letGo(), true);
window.addEventListener('pointercancel', () => letGo(), true);
// Where its end was not told.
window.addEventListener('blur', () => letGo());
window.addEventListener('pointermove', event => {
  if (event.pointerType === 'mouse' && !event.buttons) letGo();
}, true);
