/* The shared library, continued: calls to the server, state of a tab, tables, files, toasts. */
(() => {
  'use strict';
  const F = window.fettle;
  const NB = F.NB;

  /* ---------- server calls ---------- */
  class ServerError extends Error {
    constructor(found) {
      super(found.text);
      Object.assign(this, found);
      this.text = found.text;
    }
  }
  F.ServerError = ServerError;
  const sleep = ms => new Promise(r => setTimeout(r, ms));
  F.sleep = sleep;
  let lostSince = 0,
    lostTimer = 0;
  const banner = () => {
    let b = document.getElementById('ft-lost');
    if (!lostSince) {
      if (b) b.remove();
      clearInterval(lostTimer);
      lostTimer = 0;
      return;
    }
    const s = Math.round((Date.now() - lostSince) / 1000);
    if (s < 1) return;
    if (!b) {
      b = F.el('div', { id: 'ft-lost', class: 'ft ft-lost', role: 'status' }, F.icon('warn'), F.el('span', {}));
      document.body.append(b);
    }
    b.lastChild.replaceChildren(
      F.el('b', {}, `Connection to the workbench lost for ${s}${NB}s.`),
      ' Runs go on; this page catches up when the server answers.',
    );
  };
  F.lost = yes => {
    if (yes && !lostSince) {
      lostSince = Date.now();
      lostTimer ||= setInterval(banner, 500);
    }
    if (!yes && lostSince) {
      lostSince = 0;
      banner();
      dispatchEvent(new Event('fettle-back'));
    }
  };
  F.isLost = () => lostSince > 0;
  /* Gradio's client swallows a failed request and answers undefined: that is how a lost server looks from here. */
  F.call = async (server, name, given = {}, { retry = true, timeout = 15000 } = {}) => {
    for (let wait = 250; ; wait = Math.min(wait * 1.6, 3000)) {
      let answer;
      try {
        answer = await Promise.race([server[name](given), sleep(timeout).then(() => undefined)]);
      } catch {
        answer = undefined;
      }
      if (answer !== undefined) {
        F.lost(false);
        if (answer && answer.error && Object.keys(answer).length === 1) throw new ServerError(answer.error);
        return answer;
      }
      F.lost(true);
      if (!retry) throw new ServerError({ text: 'The workbench does not answer. Check that the server runs, then try again.' });
      await sleep(wait);
    }
  };
  F.debounce = (f, ms = 40) => {
    let t = 0;
    return (...a) => {
      clearTimeout(t);
      t = setTimeout(() => f(...a), ms);
    };
  };

  /* ---------- small state ---------- */
  F.query = {
    get: k => new URLSearchParams(location.search).get(k),
    set(values) {
      const q = new URLSearchParams(location.search);
      for (const [k, v] of Object.entries(values)) v === null || v === undefined || v === '' ? q.delete(k) : q.set(k, v);
      const s = q.toString();
      history.replaceState(history.state, '', location.pathname + (s ? '?' + s : '') + location.hash);
    },
  };
  F.keep = (k, otherwise) => {
    try {
      const v = sessionStorage.getItem('fettle.' + k);
      return v === null ? otherwise : JSON.parse(v);
    } catch {
      return otherwise;
    }
  };
  F.keep.set = (k, v) => {
    try {
      v === undefined ? sessionStorage.removeItem('fettle.' + k) : sessionStorage.setItem('fettle.' + k, JSON.stringify(v));
    } catch {}
  };
  F.go = (path, values = {}) => {
    const q = new URLSearchParams();
    for (const [k, v] of Object.entries(values)) if (v !== null && v !== undefined) q.set(k, v);
    const s = q.toString();
    location.href = path + (s ? '?' + s : '');
  };

  /* ---------- tables, files, small talk ---------- */
  /* columns: [{name, unit?, r? (right-aligned), f? (format)}]; rows: arrays of values */
  F.table = (columns, rows, attributes = {}) =>
    F.el(
      'table',
      { class: 'ft-table', ...attributes },
      F.el(
        'thead',
        {},
        F.el(
          'tr',
          {},
          columns.map(c =>
            F.el(
              'th',
              { scope: 'col', class: c.r ? 'r' : null },
              c.name,
              c.unit ? F.el('span', { class: 'u' }, ', ' + c.unit) : null,
            ),
          ),
        ),
      ),
      F.el(
        'tbody',
        {},
        rows.map(r =>
          F.el(
            'tr',
            {},
            r.map((v, i) =>
              F.el(
                'td',
                { class: columns[i].r ? 'r num' : null },
                v === null || v === undefined ? '' : columns[i].f ? columns[i].f(v) : String(v),
              ),
            ),
          ),
        ),
      ),
    );
  const cell = v =>
    v === null || v === undefined ? '' : /[",\n]/.test(String(v)) ? `"${String(v).replace(/"/g, '""')}"` : String(v);
  F.csv = (file, columns, rows) =>
    F.download(
      file,
      [columns.map(c => cell(c.name + (c.unit ? `, ${c.unit}` : ''))).join(','), ...rows.map(r => r.map(cell).join(','))].join(
        '\n',
      ) + '\n',
      'text/csv',
    );
  F.download = (file, text, type = 'text/plain') => {
    const a = F.el('a', { href: URL.createObjectURL(new Blob([text], { type })), download: file });
    document.body.append(a);
    a.click();
    a.remove();
    setTimeout(() => URL.revokeObjectURL(a.href), 1000);
  };
  F.copy = async (text, said = 'Copied') => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const t = F.el('textarea', { style: 'position:fixed;opacity:0' });
      t.value = text;
      document.body.append(t);
      t.select();
      document.execCommand('copy');
      t.remove();
    }
    F.toast(said);
  };
  let toasting = 0;
  F.toast = (words, kind = '') => {
    let t = document.getElementById('ft-toast');
    if (!t) {
      t = F.el('div', { id: 'ft-toast', class: 'ft ft-toast', role: 'status' });
      document.body.append(t);
    }
    t.className = 'ft ft-toast on ' + kind;
    t.replaceChildren(words);
    clearTimeout(toasting);
    toasting = setTimeout(() => t.classList.remove('on'), kind === 'bad' ? 7000 : 2200);
  };
  /* a second click within three seconds does it: no dialog, nothing destroyed by accident */
  F.confirm = (button, words) => {
    if (button.dataset.sure) {
      delete button.dataset.sure;
      return true;
    }
    const old = [...button.childNodes];
    button.dataset.sure = '1';
    button.replaceChildren(words);
    setTimeout(() => {
      delete button.dataset.sure;
      button.replaceChildren(...old);
    }, 3000);
    return false;
  };
})();
