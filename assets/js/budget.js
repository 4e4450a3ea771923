/* Budget and forecast: the limits, memory by phase, the verdict, what was chosen and why, and the smallest change when it
   does not fit. A move is painted at once; the server's answer follows. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, button, NB } = fettle.form,
    { phases, names } = fettle.parts.memory;
  const { clock, gb, icon } = fettle,
    fill = fettle.replace,
    el = fettle.el,
    GB = 1e9;
  const mmss = m => clock(m * 60);
  const STATES = {
    fits: ['good', 'i-check', 'Fits'],
    tight: ['warn', 'i-warn', 'Tight'],
    over: ['bad', 'i-cross', 'Does not fit'],
  };

  fettle.parts.budget = function (form, panel) {
    names(Object.fromEntries(form.boot.methods.map(m => [m.id, m.name])));
    const verdict = panel.querySelector('.ft-fits'),
      speed = panel.querySelector('.ft-head .sub'),
      body = panel.querySelector('.ft-body');
    const rows = [...fettle.parts.limitRows(form), ...fettle.parts.moreLimits(form)];
    const mem = phases(form),
      chosen = h('dl', { class: 'ft-why' }),
      why = h('div', null, h('p', { class: 'ft-h' }, 'Chosen for you'), chosen),
      change = h('div', { class: 'nr-change' }),
      probe = fettle.parts.probe(form),
      how = fettle.parts.how(form);
    fill(body, ...rows, h('hr', { class: 'ft-rule' }), mem, how, probe, h('hr', { class: 'ft-rule nr-why' }), why, change);
    const v = h('span', { class: 'v' }),
      text = h('span', { class: 'sm mut' });
    fill(verdict, v, text);
    const live = verdict;
    const use = c => {
      for (const [path, value] of Object.entries(c.patch || {})) {
        const p = path.replace(/\[(\d+)\]/g, '.$1');
        delete form.typed[p];
        form.set(p, value === null ? undefined : value, 'patch');
      }
      form.tell('all');
      form.tell('pipeline');
      rows.forEach(r => r.paint());
    };
    const paint = () => {
      const f = form.forecast,
        r = form.refused,
        typed = Object.keys(form.typed);
      rows.forEach(row => row.paint());
      mem.paint();
      let kind = '',
        ic = 'i-info',
        word = 'Forecast',
        said = 'asking the planner';
      if (typed.length) {
        kind = 'bad';
        ic = 'i-cross';
        word = 'Correct first';
        said = form.errors[typed[0]] || '';
      } else if (r) {
        kind = r.lost ? 'warn' : 'bad';
        ic = r.lost ? 'i-warn' : 'i-cross';
        word = r.lost ? 'No answer' : 'Refused';
        said = r.text;
      } else if (form.spec && !form.spec.pipeline.length) {
        ic = 'i-info';
        word = 'No stage yet';
        said = 'Add a method to the pipeline.';
      } else if (f) {
        [kind, ic, word] = STATES[f.verdict] || STATES[f.fits ? 'fits' : 'over'];
        said = (f.text || '').replace(/^(Fits, but tightly|Does not fit|Fits): (.)/, (_, a, b) => b.toUpperCase());
      }
      const key = word + said;
      if (live.dataset.key !== key) {
        live.dataset.key = key;
        live.className = 'ft-fits ' + (kind === 'bad' ? 'no' : kind === 'warn' ? 'maybe' : kind === 'good' ? '' : 'wait');
        live.dataset.verdict = word;
        fill(v, icon(ic), word);
        text.textContent = said;
      }
      const lim = k => {
        const l = form.get('budget.' + k);
        return l === undefined || l === null ? null : l;
      };
      form.verdict = {
        icon: ic,
        word,
        kind,
        dock: f
          ? [
              lim('memory_gb') !== null
                ? `${(f.memory.peak_bytes / GB).toFixed(2)} of ${gb(lim('memory_gb') * GB)}`
                : gb(f.memory.peak_bytes),
              lim('minutes') !== null
                ? `${clock(f.seconds.total)} of ${mmss(lim('minutes'))} min`
                : `${clock(f.seconds.total)} min`,
            ]
          : [],
      };
      speed.textContent =
        f && f.probe && !f.probe.failed
          ? f.probe.text
          : f && f.milliseconds !== undefined && f.milliseconds !== null
          ? `from shapes, in ${Math.max(1, Math.round(f.milliseconds))}${NB}ms`
          : '';
      const c = (f && f.chosen) || [];
      why.hidden = !c.length;
      body.querySelector('.nr-why').hidden = !c.length && !(f && f.verdict === 'over');
      if (c.length) fill(chosen, ...c.flatMap(x => [h('dt', { class: 'num' }, said2(x)), h('dd', null, x.why || '')]));
      const first = f && f.verdict !== 'fits' && !typed.length ? (f.changes || [])[0] : null;
      change.hidden = !first;
      const old = change.dataset.key,
        now = first ? JSON.stringify(first) : '';
      if (old !== now) {
        change.dataset.key = now;
        if (first)
          fill(
            change,
            el(
              'div',
              { class: 'ft-note warn' },
              icon('i-warn'),
              el('span', { class: 'grow' }, el('b', {}, 'Smallest change that fits: '), first.text),
              button('Use it', null, () => use(first), 'nr-use'),
            ),
          );
        else fill(change);
      }
    };
    const said2 = x => {
      const v = String(x.value),
        what = String(x.what || '').replace(/_/g, ' ');
      return v === 'true' || v === 'false'
        ? `${what} ${v === 'true' ? 'on' : 'off'}`
        : !what || v.includes(what)
          ? v
          : `${what} ${v}`;
    };
    form
      .on('forecast', paint)
      .on('all', paint)
      .on('profile', paint)
      .on('errors', () => {
        if (form.spec) paint();
      });
  };
})();
