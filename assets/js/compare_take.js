/* What a person takes along from the Compare page: tables, a report, a link, the command. */
(() => {
  'use strict';
  const F = window.fettle;
  const LABELS = { csv: 'Tables as CSV', json: 'Tables as JSON', parquet: 'Tables as Parquet' };
  const NONE = 'Choose runs in the table first';
  const bytes = body => Uint8Array.from(atob(body), c => c.charCodeAt(0));

  /* state: {ids(), names(), link()} */
  F.takeAlong = (root, server, state) => {
    const $ = s => root.querySelector(s),
      list = $('[data-export-list]'),
      button = $('[data-export]'),
      box = $('.ft-menu');
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
    const menu = on => {
      list.hidden = !on;
      button.setAttribute('aria-expanded', on);
      if (on) list.querySelector('button')?.focus();
    };
    const item = format =>
      F.el(
        'button',
        {
          type: 'button',
          onclick: () => {
            menu(false);
            download(format);
          },
        },
        LABELS[format],
      );
    F.call(server, 'formats_offered', {})
      .then(f => {
        F.replace(list, f.formats.filter(x => x !== 'report').map(item));
        $('[data-report]').hidden = !f.formats.includes('report');
      })
      .catch(e => console.warn(e));
    button.addEventListener('click', () => menu(list.hidden));
    box.addEventListener('keydown', e => {
      if (e.key === 'Escape') {
        menu(false);
        button.focus();
      }
    });
    box.addEventListener('focusout', e => {
      if (!box.contains(e.relatedTarget)) menu(false);
    });
    $('[data-report]').addEventListener('click', () => download('report'));
    $('[data-share]').addEventListener('click', () => F.copy(state.link(), 'Link copied'));
    $('[data-command]').addEventListener('click', () => {
      if (!state.names().length) return F.toast(NONE, 'bad');
      const at = state.at && state.at();
      F.copy(['python -m workbench compare', ...state.names(), ...(at && at.includes('=') ? ['--at', at] : [])].join(' '), 'Command copied');
    });
  };
})();
