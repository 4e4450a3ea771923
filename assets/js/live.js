/* The Live page: puts the panels on one bus. Panels are the files live_*.js, each adds itself to fettle.livePanels. */
const F = fettle;
const $ = s => element.querySelector(s);
const bus = new F.LiveBus(server);
const page = $('.ft-live');

const panels = F.livePanels.map(make => make(element, bus));
F.live = {
  bus,
  get charts() {
    return element.fettleCharts || {};
  },
};
const view = () => {
  const r = bus.run,
    started = r && (bus.series.size || bus.log || !['queued'].includes(r.status));
  page.dataset.view = !r ? 'none' : started ? 'run' : 'waiting';
  document.title = r ? `${r.name}, ${F.stateWord(r.status).toLowerCase()} - Fettle` : 'Live - Fettle';
};
bus.on('open', () => {
  view();
  if (bus.run) F.query.set({ run: bus.run.id });
});
bus.on('tick', (b, d) => {
  if (d.state || page.dataset.view === 'waiting') view();
});
bus.on('error', (b, e) => F.toast(e.text || String(e), 'bad'));

/* one listener for the tools of all panels */
element.addEventListener('click', e => {
  const button = e.target.closest('[data-do]');
  if (!button) return;
  const section = button.closest('[data-panel]');
  const what = button.dataset.do;
  if (what === 'expand' && section) {
    const on = section.classList.toggle('ft-full');
    document.documentElement.classList.toggle('ft-noscroll', on);
    button.setAttribute('aria-pressed', on);
  } else if (what === 'link') F.copy(location.href, 'Link copied');
  else for (const p of panels) p?.do?.(what, section?.dataset.panel, button);
});
addEventListener('keydown', e => {
  if (e.key === 'Escape') {
    for (const s of element.querySelectorAll('.ft-full')) s.classList.remove('ft-full');
    document.documentElement.classList.remove('ft-noscroll');
  }
});

const open = async id => {
  try {
    await bus.open(id);
  } catch (e) {
    if (id) {
      F.toast(e.text || String(e), 'bad');
      F.query.set({ run: null });
      await bus.open();
    } else F.toast(e.text || String(e), 'bad');
  }
};
element.addEventListener('fettle-open', e => {
  history.pushState({}, '', `/live?run=${e.detail}`);
  open(e.detail);
});
addEventListener('popstate', () => open(F.query.get('run')));
open(F.query.get('run'));
