/* The app bar: where one is, how many runs run and wait, what the machine does, the theme. */
const F = fettle;
const $ = s => element.querySelector(s);
for (const a of element.querySelectorAll('.ft-nav a'))
  if (a.getAttribute('href').replace(/\/$/, '') === location.pathname.replace(/\/$/, '')) a.setAttribute('aria-current', 'page');
$('[data-theme-toggle]').addEventListener('click', () => fettleTheme.set(fettleTheme.dark() ? 'light' : 'dark'));

const keys = $('.ft-keys');
$('[data-keys]').addEventListener('click', () => {
  keys.hidden = !keys.hidden;
  $('[data-keys]').setAttribute('aria-expanded', !keys.hidden);
});
addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest?.('input, textarea, select, [contenteditable]')) return;
  if (e.key === '?') $('[data-keys]').click();
  else if (e.key === 'Escape') keys.hidden = true;
  else if (/^[1-7]$/.test(e.key)) element.querySelectorAll('.ft-nav a')[+e.key - 1].click();
});

const meter = (name, share, words) => {
  const m = $(`[data-m="${name}"]`);
  m.hidden = share === null || share === undefined;
  if (m.hidden) return;
  m.querySelector('.ft-mini').style.setProperty('--v', Math.max(0, Math.min(1, share)).toFixed(3));
  F.text(m.querySelector('.num'), words);
};
const paint = s => {
  const n = $('.ft-nav .n');
  n.hidden = !s.running;
  F.text(n, String(s.running));
  n.title = `${s.running} running`;
  const queue = $('[data-queue]');
  queue.hidden = !(s.running || s.queued);
  queue.dataset.s = s.running ? 'running' : 'queued';
  F.text(
    queue.querySelector('b'),
    [s.running ? `${s.running} running` : '', s.queued ? `${s.queued} queued` : ''].filter(Boolean).join(', '),
  );
  F.text($('.name'), s.device);
  $('.name').title = s.detail || '';
  if (s.gpu) {
    meter('load', s.gpu.util, F.percent(s.gpu.util, 2));
    F.text($('[data-m="load"] .w'), 'Util');
    meter('memory', s.gpu.used / s.gpu.total, `${F.fixed(s.gpu.used / 1e9, 2)} / ${F.fig(s.gpu.total / 1e9)}${F.NB}GB`);
    F.text($('[data-m="memory"] .w'), 'Memory');
    F.text($('[data-power]'), F.finite(s.gpu.power) ? F.unit(s.gpu.power, 'W') : '');
    F.text($('[data-heat]'), F.finite(s.gpu.temperature) ? `${Math.round(s.gpu.temperature)}${F.NB}°C` : '');
  } else {
    meter('load', s.load, `${Math.round(100 * s.load)}${F.NB}%`);
    meter('memory', s.used / s.total, `${F.fixed(s.used / 1e9, 1)} / ${F.fixed(s.total / 1e9, 1)}${F.NB}GB`);
  }
};
if (props.value) paint(props.value);
let busy = false;
const tick = async () => {
  if (busy || document.hidden) return;
  busy = true;
  try {
    const s = await F.call(server, 'status');
    paint(s);
    dispatchEvent(new CustomEvent('fettle-status', { detail: s }));
  } catch (e) {
    console.warn(e);
  } finally {
    busy = false;
  }
};
tick();
const timer = setInterval(() => {
  if (!element.isConnected) return clearInterval(timer);
  tick();
}, 2000);
document.addEventListener('visibilitychange', tick);
addEventListener('fettle-changed', tick);
