/* Live: figures per layer and matrix (rank, sparsity, bits, error) as heat maps, changed in place. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];
  const KNOWN = {
    rank: { title: 'Rank', unit: '' },
    sparsity: { title: 'Sparsity', unit: '%' },
    bits: { title: 'Bits', unit: '' },
    error: { title: 'Error', unit: '' },
    heads: { title: 'Heads kept', unit: '' },
    channels: { title: 'Channels kept', unit: '' },
    change: { title: 'Change', unit: '' },
    frozen: { title: 'Frozen', unit: '' },
    diversity: { title: 'Sign diversity', unit: '' },
    gap: { title: 'Singular gap', unit: '' },
  };
  const SHORT = {
    query: 'q',
    key: 'k',
    value: 'v',
    output: 'o',
    q_proj: 'q',
    k_proj: 'k',
    v_proj: 'v',
    o_proj: 'o',
    gate_proj: 'gate',
    up_proj: 'up',
    down_proj: 'down',
    attention_output: 'o',
  };

  F.livePanels.push((root, bus) => {
    const panel = root.querySelector('[data-panel="map"]'),
      box = panel.querySelector('[data-t="maps"]'),
      seg = panel.querySelector('[data-seg="map"]');
    let chosen = F.keep('live.map', null),
      built = '',
      cells = new Map();
    const names = () => Object.keys(bus.layers?.figures || {}).filter(n => bus.layers.figures[n]?.length);
    const scale = name => {
      const rows = bus.layers.figures[name],
        v = rows.map(r => r[2]).filter(F.finite),
        share = name === 'sparsity' && v.every(x => x >= 0 && x <= 1);
      /* small figures are shown in a power of ten that is named once, so that they fit their cells */
      const top = Math.max(...v.map(Math.abs)),
        power = !share && top > 0 && top < 0.1 ? -Math.floor(Math.log10(top)) : 0,
        k = share ? 100 : 10 ** power,
        lo = Math.min(...v) * k,
        hi = Math.max(...v) * k;
      return { k, power, lo, hi, mean: (v.reduce((a, b) => a + b, 0) / v.length) * k, sum: v.reduce((a, b) => a + b, 0) };
    };
    const put = (td, v, s) => {
      const q = s.hi > s.lo ? (v * s.k - s.lo) / (s.hi - s.lo) : 0.5,
        x = v * s.k;
      td.style.setProperty('--t', q.toFixed(3));
      td.className = q > 0.646 ? 'hi' : q > 0.512 ? 'mid' : '';
      F.text(td, Number.isInteger(x) || Math.abs(x) >= 10 ? x.toFixed(0) : F.fig(x, 2));
    };
    const head = (name, s) => {
      const k = KNOWN[name] || { title: name, unit: '' },
        f = v => F.fig(v, Number.isInteger(v) ? 3 : 2).replace(/\.0+$/, '');
      return [
        k.title,
        name === 'frozen'
          ? `${F.whole(s.sum)} of ${F.whole(bus.layers.figures.frozen.length)}`
          : name === 'rank'
          ? `sum ${F.whole(s.sum)}`
          : name === 'sparsity'
            ? `mean ${F.fixed(s.mean, 1)}${F.NB}%`
            : `mean ${F.fig(s.mean)}${s.power ? ` × 1e-${s.power}` : ''}`,
        f(s.lo),
        f(s.hi) + (k.unit ? F.NB + k.unit : ''),
      ];
    };
    const paint = () => {
      const all = names();
      F.text(panel.querySelector('.sub'), all.length ? `step ${F.whole(bus.layers.step)}` : '');
      seg.hidden = all.length <= 2;
      if (!all.length) {
        built = '';
        F.replace(
          box,
          F.el(
            'div',
            { class: 'ft-empty' },
            F.el(
              'p',
              { class: 'sm' },
              bus.live
                ? 'Ranks, sparsity and bits of every matrix appear here as soon as a stage sets them.'
                : 'No stage of this run reported figures per layer.',
            ),
          ),
        );
        return;
      }
      const two = all.length <= 2 ? all : [chosen && all.includes(chosen) ? chosen : all[0]];
      if (all.length > 2) two.push(all.find(n => n !== two[0]));
      const shown = all.length > 2 ? two.slice(0, 2) : two;
      const stamp = JSON.stringify([bus.run.id, all, shown, shown.map(n => bus.layers.figures[n].map(r => [r[0], r[1]]))]);
      if (stamp !== built) {
        build(shown);
        built = stamp;
        if (!seg.hidden)
          F.replace(
            seg,
            all.map(n =>
              F.el(
                'button',
                { type: 'button', 'data-v': n, 'aria-pressed': String(n === shown[0]) },
                (KNOWN[n] || { title: n }).title,
              ),
            ),
          );
      }
      for (const n of shown) {
        const s = scale(n),
          c = cells.get(n);
        const [title, sub, lo, hi] = head(n, s);
        F.text(c.title, title + ' ');
        F.text(c.sub, sub);
        F.text(c.lo, lo);
        F.text(c.hi, hi);
        for (const [layer, role, v] of bus.layers.figures[n]) {
          const td = c.at.get(`${layer}|${role}`);
          if (td && F.finite(v)) {
            put(td, v, s);
            td.title = `layer ${layer}, ${role}: ${F.fig(s.power ? v : v * s.k, 4)}`;
          }
        }
      }
    };
    const build = shown => {
      cells = new Map();
      F.replace(
        box,
        F.el(
          'div',
          { class: 'ft-maps' + (shown.length === 1 ? ' one' : '') },
          shown.map(n => {
            const rows = bus.layers.figures[n],
              layers = [...new Set(rows.map(r => r[0]))],
              roles = [...new Set(rows.map(r => r[1]))];
            const at = new Map(),
              has = new Set(rows.map(r => `${r[0]}|${r[1]}`));
            const c = {
              at,
              title: document.createTextNode(''),
              sub: F.el('span', { class: 'sub num' }),
              lo: document.createTextNode(''),
              hi: document.createTextNode(''),
            };
            cells.set(n, c);
            return F.el(
              'div',
              {},
              F.el(
                'p',
                { class: 'ft-h' },
                c.title,
                c.sub,
                F.el('span', { class: 'grow' }),
                F.el('span', { class: 'sub num row ft-tightest' }, c.lo, F.el('i', { class: 'ft-ramp' }), c.hi),
              ),
              F.el(
                'div',
                { class: 'ft-heatbox' },
                F.el(
                  'table',
                  { class: 'ft-heat' },
                  F.el(
                    'thead',
                    {},
                    F.el(
                      'tr',
                      {},
                      F.el('th', {}),
                      roles.map(r => F.el('th', { scope: 'col', title: r }, SHORT[r] || r)),
                    ),
                  ),
                  F.el(
                    'tbody',
                    {},
                    layers.map(l =>
                      F.el(
                        'tr',
                        {},
                        F.el('th', { scope: 'row' }, String(l)),
                        roles.map(r => {
                          const td = F.el('td', {});
                          if (has.has(`${l}|${r}`)) at.set(`${l}|${r}`, td);
                          else td.className = 'none';
                          return td;
                        }),
                      ),
                    ),
                  ),
                ),
              ),
            );
          }),
        ),
      );
    };
    seg.addEventListener('click', e => {
      const b = e.target.closest('button');
      if (!b) return;
      chosen = b.dataset.v;
      F.keep.set('live.map', chosen);
      paint();
    });
    bus.on('open', paint);
    bus.on('tick', (b, d) => {
      if (d.layers || d.state) paint();
    });
    return {
      do(what, where) {
        if (where === 'map' && what === 'csv' && names().length)
          F.csv(
            `${bus.run.name}-layers.csv`,
            [{ name: 'figure' }, { name: 'layer' }, { name: 'matrix' }, { name: 'value' }],
            names().flatMap(n => bus.layers.figures[n].map(r => [n, ...r])),
          );
      },
    };
  });
})();
