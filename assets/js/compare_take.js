/* What a person takes along from the Compare page: tables, a report, a link, the command. */
(() => {
  'use strict';
  const F = window.fettle;
  const LABELS = { csv: 'Tables as CSV', json: 'Tables as JSON', parquet: 'Tables as Parquet' };
  const NONE = 'Choose runs in the table first';
  const bytes = body => Uint8Array.from(atob(body), c => c.charCodeAt(0));

  /* state: {ids(), names(), link()} */
  F.takeAlong = (root, server, state) => {
    const $ = s => root.querySelector(s);
    /* A button with a list of choices under it; `items` are [text, what it does]. */
    const menu = (name, items) => {
      const list = $(`[data-${name}-list]`),
        button = $(`[data-${name}]`),
        box = button.closest('.ft-menu');
      const show = on => {
        list.hidden = !on;
        button.setAttribute('aria-expanded', on);
        if (on) list.querySelector('button')?.focus();
      };
      const item = ([text, act]) =>
        F.el(
          'button',
          {
            type: 'button',
            onclick: () => {
              show(false);
              act();
            },
          },
          text,
        );
      F.replace(list, items.map(item));
      button.addEventListener('click', () => show(list.hidden));
      box.addEventListener('keydown', e => {
        if (e.key === 'Escape') {
          show(false);
          button.focus();
        }
      });
      box.addEventListener('focusout', e => {
        if (!box.contains(e.relatedTarget)) show(false);
      });
    };
    const download = async format => {
      if (!state.ids().length) return F.toast(NONE, 'bad');
      try {
        const f = await F.call(server, 'export', { ids: state.ids(), format }, { retry: false, timeout: 120000 });
        F.download(f.name, bytes(f.body), f.type);
        F.toast(`${f.name} saved`);
      } catch (e) {
        F.toast(e.text, 'bad');
      }
    };
    const merge = async weight => {
      const ids = state.ids();
      if (ids.length < 2) return F.toast('Choose two runs or more in the table first', 'bad');
      try {
        const made = await F.call(server, 'merge', { ids, weight: weight || 1 / ids.length }, { retry: false, timeout: 60000 });
        F.go('/live', { run: made.id });
      } catch (e) {
        F.toast(e.text, 'bad');
      }
    };
    F.call(server, 'formats_offered', {})
      .then(f => {
        menu(
          'export',
          f.formats.filter(x => x !== 'report').map(x => [LABELS[x], () => download(x)]),
        );
        $('[data-report]').hidden = !f.formats.includes('report');
      })
      .catch(e => console.warn(e));
    menu('merge', [
      ['Add adapters, weight 1 each', () => merge(1)],
      ['Add adapters, weight 0.6 each', () => merge(0.6)],
      ['Mean of the adapters', () => merge(0)],
    ]);
    $('[data-report]').addEventListener('click', () => download('report'));
    $('[data-share]').addEventListener('click', () => F.copy(state.link(), 'Link copied'));
    $('[data-command]').addEventListener('click', () => {
      if (!state.names().length) return F.toast(NONE, 'bad');
      const at = state.at && state.at();
      F.copy(['python -m workbench compare', ...state.names(), ...(at && at.includes('=') ? ['--at', at] : [])].join(' '), 'Command copied');
    });
  };
})();
