/* Memory by phase and part, and the clock's phases with their colours. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, words, nice, plain } = fettle.form;
  const { size: bytes, clock } = fettle,
    fill = fettle.replace,
    GB = 1e9;
  const PARTS = [
    ['context', 'Process and libraries'],
    ['weights', 'Weights'],
    ['adapter', 'Adapter'],
    ['gradients', 'Gradients'],
    ['optimizer', 'Optimizer'],
    ['activations', 'Activations'],
    ['logits', 'Logits'],
    ['kv', 'KV cache'],
    ['extra', 'Work space'],
  ];
  const partColour = k =>
    k === 'extra' ? 'color-mix(in srgb, var(--ft-part-context) 45%, var(--ft-ink-3))' : `var(--ft-part-${k})`;

  /* clock phases with their colours: stages in turn, evaluation, everything else */
  function times(f) {
    const rows = Array.isArray(f.seconds.phases)
      ? f.seconds.phases
      : Object.entries(f.seconds.phases || {}).map(([phase, seconds]) => ({ phase, seconds }));
    return rows
      .filter(r => r.seconds > 0)
      .map(r => {
        const m = /^(\d+)\s/.exec(r.phase),
          name = phaseName(r.phase);
        if (m) return { ...r, c: `var(--ft-time-${((m[1] - 1) % 3) + 1})`, t: `${name} ${clock(r.seconds)}`, s: name, k: m[1] };
        return {
          ...r,
          c: /eval/i.test(r.phase) ? 'var(--ft-time-eval)' : 'var(--ft-time-other)',
          t: `${name} ${clock(r.seconds)}`,
        };
      });
  }
  let methodNames = {};
  function phaseName(p, sentence) {
    const m = /^(\d+)\s+(\S+)(.*)$/.exec(p || '');
    if (m) return sentence ? `in stage ${m[1]}` : `${m[1]} ${methodNames[m[2]] || words(m[2])}${m[3]}`;
    return sentence ? `in ${p}` : words(p || '');
  }

  function phases(form) {
    const grid = h('div', { class: 'ft-phases' }),
      legend = h('p', { class: 'ft-legend' }),
      how = h('span', { class: 'sub' });
    const root = h('div', { class: 'nr-phases' }, h('p', { class: 'ft-h' }, 'Memory by phase ', how), grid, legend);
    root.paint = () => {
      const f = form.forecast,
        lim = form.get('budget.memory_gb') || null;
      root.classList.toggle('stale', !f);
      if (!f || !f.memory) return;
      const rows = f.memory.phases || [],
        top = Math.max(...rows.map(r => r.total / GB), lim || 0) * (lim ? 1.12 : 1.05) || 1;
      const max =
        [0.2, 0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 200].find(
          v => v >= top,
        ) || nice(top);
      grid.style.setProperty('--lim', lim ? Math.min(1, lim / max) : 1.2);
      grid.classList.toggle('nolim', !lim);
      const used = new Set();
      const line = r => {
        let a = 0;
        const bits = PARTS.filter(([k]) => r.parts[k] > 0).map(([k, t]) => {
          used.add(k);
          const b = a + r.parts[k] / GB / max,
            i = h('i', { title: `${t}: ${bytes(r.parts[k])}`, vars: { a, b, c: partColour(k) } });
          a = b;
          return i;
        });
        const peak = r.phase === f.memory.peak_phase,
          over = lim && r.total / GB > lim;
        return [
          h('span', { class: (peak ? 'peak' : 'mut') + ' ell' }, phaseName(r.phase)),
          h('span', { class: 'bar' }, ...bits),
          h('span', { class: `num r ${peak ? 'peak' : ''} ${over ? 'bad' : ''}` }, (r.total / GB).toFixed(2)),
        ];
      };
      const marks = [0, max / 2, max]
        .map(v => [v / max, v === 0 ? '0' : plain(+v.toPrecision(3))])
        .filter(([p]) => !lim || p === 0 || Math.abs(p - lim / max) > (innerWidth <= 720 ? 0.26 : 0.19));
      if (lim && lim <= max) marks.push([lim / max, `limit ${lim.toFixed(2)}`, 1]);
      marks.sort((a, b) => a[0] - b[0]);
      fill(
        grid,
        ...rows.flatMap(line),
        h(
          'span',
          { class: 'ax', 'aria-hidden': 'true' },
          ...marks.map(([p, t, b]) =>
            h('span', { class: b ? 'lim' + (p > 0.85 ? ' end' : '') : p === 1 ? 'end' : p === 0 ? 'beg' : '', vars: { p } }, t),
          ),
        ),
      );
      grid.setAttribute('role', 'img');
      grid.setAttribute('aria-label', 'Memory by phase: ' + rows.map(r => `${phaseName(r.phase)} ${bytes(r.total)}`).join(', '));
      fill(
        legend,
        ...PARTS.filter(([k]) => used.has(k)).map(([k, t]) => h('span', null, h('i', { vars: { c: partColour(k) } }), t)),
      );
      how.textContent = f.memory.device === 'cuda' ? 'allocator, GB' : 'host RSS, GB';
      how.title = f.memory.how || '';
    };
    return root;
  }

  fettle.parts.memory = { PARTS, partColour, phaseName, times, phases, names: found => (methodNames = found) };
})();
