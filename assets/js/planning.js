/* Plan: shows one of its sections; which one is in the address. A section hears of it through the event "fettle-view". */
const links = [...element.querySelectorAll('[data-view]')];
const toggle = name => {
  for (const a of links) document.getElementById(`view-${a.dataset.view}`)?.classList.toggle('on', a.dataset.view === name);
};
const show = () => {
  const asked = fettle.query.get('view'),
    name = links.some(a => a.dataset.view === asked) ? asked : links[0].dataset.view;
  for (const a of links) {
    if (a.dataset.view === name) a.setAttribute('aria-current', 'page');
    else a.removeAttribute('aria-current');
  }
  toggle(name);
  dispatchEvent(new CustomEvent('fettle-view', { detail: name }));
};
for (const a of links)
  a.addEventListener('click', e => {
    if (e.ctrlKey || e.metaKey || e.shiftKey) return;
    e.preventDefault();
    fettle.query.set({ view: a.dataset.view === links[0].dataset.view ? null : a.dataset.view });
    show();
  });
addEventListener('popstate', show);
show();
/* Gradio may mount a section, or write its classes anew, after this ran */
const again = new MutationObserver(() => {
  const name = element.querySelector('[aria-current]').dataset.view;
  if (links.some(a => document.getElementById(`view-${a.dataset.view}`)?.classList.contains('on') !== (a.dataset.view === name))) toggle(name);
});
again.observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ['class'] });
setTimeout(() => again.disconnect(), 20000);
