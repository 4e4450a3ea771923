/* Settings that differ between the chosen runs, and whether two of them can be told apart. */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  const plain = v =>
    v === null || v === undefined
      ? 'not used'
      : v === true
        ? 'yes'
        : v === false
          ? 'no'
          : typeof v === 'number'
            ? Number.isInteger(v)
              ? v.toLocaleString('en-US')
              : Math.abs(v) < 0.001 || Math.abs(v) >= 1e6
                ? v.toExponential().replace('e+', 'e')
                : String(v)
            : typeof v === 'object'
              ? JSON.stringify(v)
              : String(v);
  const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
  const head = r => F.el('th', { scope: 'col' }, F.el('span', { class: 'row', style: 'gap:5px' }, F.runMark(r.slot, 9), r.name));

  /* answer of diff(): {runs: [{id, name, slot}], fields: [{name, values: [one per run]}]} */
  F.Diff = class {
    constructor(body, tools, sub, on) {
      Object.assign(this, { body, sub, on });
      this.button = F.el('button', {
        type: 'button',
        class: 'ft-btn quiet',
        style: 'height:26px',
        onclick: () => {
          on.change({ all: on.state.all ? null : 1 });
          this.show(this.answer);
        },
      });
      F.replace(tools, this.button);
    }
    show(answer) {
      this.answer = answer;
      const differ = answer.fields.filter(f => !f.minor && f.values.some(v => !same(v, f.values[0]))),
        all = this.on.state.all,
        rows = all ? answer.fields : differ,
        n = answer.fields.length;
      F.text(this.sub, answer.runs.length < 2 ? '' : `${differ.length} of ${n} fields, against the first`);
      F.text(this.button, all ? 'Show what differs' : `Show all ${n}`);
      this.button.hidden = differ.length === n && !all;
      const key = JSON.stringify([rows, answer.runs]);
      if (key === this.key) return;
      this.key = key;
      if (answer.runs.length < 2 && !all)
        return F.replace(this.body, F.el('p', { class: 'ft-none pad' }, 'Choose a second run to see what differs.'));
      if (!rows.length)
        return F.replace(
          this.body,
          F.el('p', { class: 'ft-none pad' }, 'Nothing differs: these runs have the same settings and the same seed.'),
        );
      F.replace(
        this.body,
        F.el(
          'div',
          { class: 'ft-scroll' },
          F.el(
            'table',
            { class: 'ft-table' },
            F.el('thead', {}, F.el('tr', {}, F.el('th', { scope: 'col' }, 'Field'), answer.runs.map(head))),
            F.el(
              'tbody',
              {},
              rows.map(f =>
                F.el(
                  'tr',
                  {},
                  F.el('th', { scope: 'row', class: 'dim' }, f.name),
                  f.values.map((v, i) =>
                    F.el(
                      'td',
                      {
                        class: `num ${v === null || v === undefined ? 'dim ' : ''}${i && !same(v, f.values[0]) ? 'ft-diff' : ''}`,
                      },
                      plain(v),
                    ),
                  ),
                ),
              ),
            ),
          ),
        ),
      );
    }
  };

  /* answer of paired(): {text, comparable, difference, low, high, p, n, metric, a, b} */
  F.Paired = class {
    constructor(body, on) {
      Object.assign(this, { body, on });
      const list = name => {
        const s = F.el('select', { class: 'ft-in s ft-sel', 'aria-label': name });
        s.addEventListener('change', () => on.pick(+this.a.value, +this.b.value));
        return s;
      };
      this.a = list('First run');
      this.b = list('Second run');
      this.out = F.el('div', { role: 'status' });
      this.bar = F.el(
        'div',
        { class: 'row wrap', style: 'margin-bottom:8px' },
        this.a,
        F.el('span', { class: 'dim sm' }, 'and'),
        this.b,
      );
      this.tiers = F.el('div', { class: 'ft-tiers' });
      F.replace(body, this.bar, this.out, this.tiers);
    }
    runs(list, pair) {
      const key = JSON.stringify(list.map(r => [r.id, r.name]));
      this.bar.hidden = list.length < 2;
      if (key !== this.key) {
        this.key = key;
        for (const s of [this.a, this.b])
          F.replace(
            s,
            list.map(r => F.el('option', { value: r.id }, r.name)),
          );
      }
      if (pair) {
        this.a.value = pair[0];
        this.b.value = pair[1];
      }
      if (list.length < 2)
        F.replace(this.out, F.el('p', { class: 'ft-none' }, 'Choose two runs with an evaluation on the same items.'));
    }
    /* answer of ranks(): {rows: [{id, name, slot, tier, value}], metric, text}; best first */
    rank(t) {
      if (!t || t.rows.length < 3) return F.replace(this.tiers);
      F.replace(
        this.tiers,
        F.el(
          'h3',
          { class: 'ft-h' },
          'Tiers',
          F.el('span', { class: 'sub' }, 'runs in one tier cannot be told apart from its best'),
        ),
        F.el(
          'div',
          { class: 'ft-tier-list' },
          t.rows.map((r, i) => [
            F.el('span', { class: 'tier' }, i && t.rows[i - 1].tier === r.tier ? F.el('i') : F.el('b', {}, r.tier)),
            F.el('span', { class: 'row', style: 'gap:6px;min-width:0' }, F.runMark(r.slot, 9), r.name),
            F.num(Math.abs(r.value) >= 20 ? r.value.toFixed(1) : r.value.toFixed(3), t.metric, 'num r'),
          ]),
        ),
        F.el('p', { class: 'mi dim' }, t.text),
      );
    }
    show(t) {
      const apart = t.comparable && t.low * t.high > 0,
        v = !t.comparable ? 'na' : apart ? 'good' : 'noise';
      const glyph = { na: 'na', good: 'check', noise: 'noise' }[v];
      const [lead, rest] = split(t.text);
      F.replace(
        this.out,
        F.el('div', { class: 'ft-note' }, F.icon(glyph), F.el('span', {}, F.el('b', {}, lead), rest)),
        t.comparable ? this.scale(t) : null,
      );
    }
    /* the difference with its interval, and where none would be */
    scale(t) {
      const w = Math.max(220, Math.min(520, (this.body.clientWidth || 360) - 24)),
        h = 54,
        most = Math.max(Math.abs(t.low), Math.abs(t.high), Math.abs(t.difference)) * 1.25 || 1;
      const X = v => w / 2 + (v / most) * (w / 2 - 40),
        line = (a, o) => F.svg('line', { x1: a[0], y1: a[1], x2: a[2], y2: a[3], ...o }),
        text = (x, y, s, anchor, cls = '') => F.svg('text', { x, y, 'text-anchor': anchor, class: cls }, s);
      const sign = v => (v > 0 ? '+' : v < 0 ? '−' : '') + F.fig(Math.abs(v));
      return F.el(
        'div',
        { class: 'ft-chart', style: 'margin-top:8px' },
        F.svg(
          'svg',
          {
            width: w,
            height: h,
            viewBox: `0 0 ${w} ${h}`,
            role: 'img',
            'aria-label': `Difference ${sign(t.difference)}, from ${sign(t.low)} to ${sign(t.high)}`,
          },
          line([X(0), 4, X(0), 34], { class: 'axis' }),
          line([X(t.low), 18, X(t.high), 18], { style: 'stroke:var(--ft-ink-2);stroke-width:3;opacity:.45' }),
          F.svg('circle', { cx: X(t.difference), cy: 18, r: 4, style: 'fill:var(--ft-ink)' }),
          text(X(t.low), 34 + 12, sign(t.low), 'middle'),
          text(X(t.high), 34 + 12, sign(t.high), 'middle'),
          Math.abs(X(0) - X(t.low)) > 34 && Math.abs(X(0) - X(t.high)) > 34 ? text(X(0), 46, '0', 'middle') : null,
          text(4, 22, F.lowerIsBetter(t.metric) === t.difference < 0 ? '' : '', 'start'),
        ),
      );
    }
  };
  const split = s => {
    const i = s.indexOf('. ');
    return i < 0 ? [s, ''] : [s.slice(0, i + 1) + ' ', s.slice(i + 2)];
  };
})();
