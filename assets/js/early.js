/* Runs in the head, before anything is painted: the chosen theme wins over the system's, and Gradio's own
   class on body is kept in step with it. */
(() => {
  const root = document.documentElement;
  const system = matchMedia('(prefers-color-scheme: dark)');
  const chosen = () => {
    try {
      return localStorage.getItem('fettle.theme');
    } catch {
      return null;
    }
  };
  const dark = () => {
    const c = chosen();
    return c ? c === 'dark' : system.matches;
  };
  const apply = () => {
    const d = dark();
    root.classList.toggle('dark', d);
    root.classList.toggle('light', !d);
    const body = document.body;
    if (body && body.classList.contains('dark') !== d) body.classList.toggle('dark', d);
  };
  window.fettleTheme = {
    dark,
    set(value) {
      try {
        value ? localStorage.setItem('fettle.theme', value) : localStorage.removeItem('fettle.theme');
      } catch {}
      apply();
    },
  };
  apply();
  system.addEventListener('change', apply);
  addEventListener('storage', e => {
    if (e.key === 'fettle.theme') apply();
  });
  addEventListener('DOMContentLoaded', () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributes: true, attributeFilter: ['class'] });
  });
})();
