/* One limit of the budget: a slider whose handle is the limit line on the forecast's own bar. A move is painted at once. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, NB, parseNumber, parseMinutes, plain } = fettle.form,
    { PARTS, partColour, phaseName, times } = fettle.parts.memory;
  const { whole: count, size: bytes, clock, percent, fig, gb } = fettle,
    fill = fettle.replace;
  const GB = 1e9,
    MB = 1e6;
  const mmss = m => clock(m * 60);

  /* each limit: how a value is read, written and laid on its scale. `at` is the position's unit (minutes, GB, share, MB). */
  const LIMITS = [
    {
      key: 'minutes',
      name: 'Minutes',
      unit: 'min',
      start: 2,
      floor: 1,
      write: mmss,
      tick: mmss,
      read: parseMinutes,
      example: '2:00',
      steps: [1, 2, 3, 5, 10, 15, 30, 60, 120, 240, 480, 960, 1440, 2880, 10080],
      part: 0.05,
    },
    {
      key: 'memory_gb',
      name: 'Memory',
      unit: 'GB',
      start: 2,
      floor: 0.5,
      write: v => (v >= 100 ? fig(v) : v.toFixed(2)),
      tick: v => plain(+v.toPrecision(3)),
      read: t => parseNumber(t.replace(/\s*gb$/i, '')),
      example: '2',
      part: 0.01,
    },
    {
      key: 'trainable',
      name: 'Trainable',
      unit: '',
      start: 0.05,
      floor: 0.001,
      write: v => percent(v),
      tick: v => plain(+(v * 100).toPrecision(3)),
      last: NB + '%',
      read: parseNumber,
      example: '5 % or 300,000',
      part: 0.0001,
    },
    {
      key: 'size_mb',
      name: 'Size',
      unit: 'MB',
      start: 10,
      floor: 0.1,
      write: v => fig(v),
      tick: v => plain(+v.toPrecision(3)),
      last: NB + 'MB',
      read: t => parseNumber(t.replace(/\s*mb$/i, '')),
      example: '10',
      part: 0.01,
    },
    {
      // the floor: bits/byte at most, accuracy at least, whichever the task is measured in
      key: 'quality',
      name: 'Quality',
      unit: 'bits/byte',
      start: 1.5,
      floor: 0.5,
      write: v => plain(+v.toPrecision(4)),
      tick: v => plain(+v.toPrecision(3)),
      read: t => parseNumber(t.replace(/\s*(%|bits\/byte)$/i, '')),
      example: '1.5',
      part: 0.01,
    },
  ];
  /* of the quality row: is it accuracy, and what is expected, in the unit of the scale */
  const accuracy = form => {
    const m = ((form.forecast || {}).limits || {}).quality,
      metric = m && m.metric;
    return metric ? metric === 'accuracy' : ((form.profile || {}).task || '').includes('classification');
  };
  const expected = form => {
    const row = ((form.forecast || {}).limits || {}).quality,
      k = accuracy(form) ? 100 : 1;
    if (!row || row.value === null || row.value === undefined) return { row };
    return { row, value: k * row.value, low: k * row.low, high: k * row.high };
  };

  function limitRow(form, L) {
    const path = 'budget.' + L.key,
      N = 1000;
    const box = h('input', { type: 'checkbox', class: 'ft-check' }),
      say = h('span', { class: 'say' });
    const input = h('input', {
      class: 'ft-in s n',
      'aria-label': `${L.name} limit, for example ${L.example}`,
      autocomplete: 'off',
      spellcheck: 'false',
    });
    const set = h('span', { class: 'set' }),
      err = h('span', { role: 'alert' });
    const gauge = h('div', { class: 'ft-gauge' }),
      over = h('i', { class: 'over' }),
      ticks = h('div', { class: 'ft-ticks' }),
      labels = h('div', { class: 'nr-lbls', 'aria-hidden': 'true' });
    const slider = h('input', { type: 'range', class: 'ft-range', min: 0, max: N, step: 1, 'aria-label': `${L.name} limit` });
    const root = h(
      'div',
      { class: 'ft-limit', 'data-limit': L.key },
      h('label', null, box, L.name),
      say,
      set,
      h('div', { class: 'scale' }, gauge, ticks, labels, slider),
      err,
    );
    let max = 0,
      held = false,
      last = L.start;
    const parameters = () => (form.profile && form.profile.parameters) || 0;
    /* the limit in the unit of the scale: a count of trainable parameters becomes a share */
    const least = () => L.key === 'quality' && accuracy(form);
    const unit = () => (least() ? '%' : L.unit);
    const limit = () => {
      const v = form.get(path);
      if (least() && v !== undefined && v !== null && v <= 1) return v * 100;
      return v === undefined || v === null ? null : L.key === 'trainable' && v > 1 ? (parameters() ? v / parameters() : 1) : v;
    };
    const value = () => {
      const f = form.forecast;
      if (!f) return null;
      if (L.key === 'minutes') return f.seconds ? f.seconds.total / 60 : null;
      if (L.key === 'memory_gb') return f.memory ? f.memory.peak_bytes / GB : null;
      if (L.key === 'trainable') return f.trainable ? f.trainable.share : null;
      if (L.key === 'quality') return expected(form).value ?? null;
      return f.size ? f.size.bytes / MB : null;
    };
    /* the end of the scale: room beyond the limit and the forecast, and still while a handle is held */
    const rescale = () => {
      if (held || (max && value() === null && (limit() || 0) <= max)) return; // refused for now: the ruler stays as it was
      const x = Math.max((limit() || 0) * 1.4, (value() || 0) * 1.12, L.floor);
      let m;
      if (least()) m = 100;
      else if (L.key === 'trainable')
        m = Math.min(1, [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].find(s => s >= x) || 1);
      else if (L.steps) m = L.steps.find(s => s >= x) || x;
      else m = [1, 1.5, 2, 3, 4, 5, 8, 10].map(k => k * 10 ** Math.floor(Math.log10(x))).find(v => v >= x * 0.999);
      if (L.key === 'trainable' && limit() > m) m = 1;
      if (m === max) return;
      max = m;
      const parts =
        L.key === 'minutes'
          ? m % 3 === 0
            ? 3
            : m % 4 === 0
              ? 4
              : m % 5 === 0
                ? 5
                : 2
          : [1, 2, 4, 8].includes(m / 10 ** Math.floor(Math.log10(m) + 1e-9))
            ? 4
            : String(m).replace(/[.0]/g, '').startsWith('3')
              ? 3
              : 5;
      ticks.style.setProperty('--n', parts * (parts === 3 ? 6 : 4));
      const shown = [1, 3].includes(parts) || L.key === 'minutes' ? parts : parts % 2 ? parts : parts / (parts > 4 ? 2 : 1);
      fill(
        labels,
        ...Array.from({ length: shown + 1 }, (_, k) =>
          h(
            'span',
            { class: 'lbl ' + (k === 0 ? 'first' : k === shown ? 'last' : ''), vars: { p: k / shown } },
            k === 0 && L.key !== 'minutes'
              ? '0'
              : L.tick((m * k) / shown) + (k === shown ? L.last || (L.key === 'memory_gb' ? NB + 'GB' : '') : ''),
          ),
        ),
      );
    };
    const place = () => {
      const v = limit(),
        on = v !== null;
      root.classList.toggle('off', !on);
      box.checked = on;
      gauge.style.setProperty('--lim', on ? Math.min(1, v / max) : 1.2);
      if (!held) slider.value = on ? Math.round(Math.min(1, v / max) * N) : N;
      slider.setAttribute('aria-valuetext', on ? `${L.write(v)} ${unit()}` : 'no limit');
    };
    const field = () => {
      const v = form.get(path);
      if (path in form.typed) {
        if (document.activeElement !== input) input.value = form.typed[path];
        return;
      }
      if (document.activeElement === input) return;
      if (v === undefined || v === null) return;
      input.value = L.key === 'trainable' && v > 1 ? count(v) : L.write(v);
      input.style.width = Math.max(54, input.value.length * 7 + 14) + 'px';
    };
    const shown = () => {
      const on = (form.get(path) !== undefined && form.get(path) !== null) || path in form.typed;
      const key = on + unit();
      if (set.dataset.on === key) return;
      set.dataset.on = key;
      fill(set, ...(on ? [least() ? 'at least' : 'at most', input, unit()] : [L.key === 'quality' ? 'no floor' : 'no limit']));
    };
    const segments = () => {
      const f = form.forecast,
        v = value(),
        lim = limit(),
        tooMuch = v !== null && lim !== null && (least() ? v < lim * 0.9999999 : v > lim * 1.0000001);
      let parts = [];
      if (f && v !== null) {
        if (L.key === 'minutes') parts = times(f).map(p => ({ n: p.seconds / 60, c: p.c, t: p.t, s: p.s, k: p.k }));
        else if (L.key === 'memory_gb') {
          const peak = (f.memory.phases || []).find(p => p.phase === f.memory.peak_phase) || { parts: {} };
          parts = PARTS.filter(([k]) => peak.parts[k] > 0).map(([k, t]) => ({
            n: peak.parts[k] / GB,
            c: partColour(k),
            title: `${t}: ${bytes(peak.parts[k])}`,
          }));
        } else if (L.key === 'quality') {
          const e = expected(form);
          parts = [
            { n: Math.max(0, e.low), c: 'var(--ft-ink-3)' },
            { n: e.high - e.low, c: 'color-mix(in srgb, var(--ft-ink-3) 45%, transparent)', title: '90 % interval' },
          ];
        } else parts = [{ n: v, c: 'var(--ft-ink-3)' }];
      }
      let a = 0;
      fill(
        gauge,
        ...parts.map(p => {
          const b = a + p.n / max,
            i = h(
              'i',
              {
                class: 'seg',
                title: p.title || p.t,
                vars: {
                  a: Math.min(1, a),
                  b: Math.min(1, b),
                  c: tooMuch ? `color-mix(in srgb, var(--ft-bad) 62%, ${p.c})` : p.c,
                },
              },
              [p.t, p.s, p.k].find(t => t && b - a > 0.0145 * t.length + 0.012) || '',
            );
          a = b;
          return i;
        }),
        over,
      );
      gauge.setAttribute('aria-hidden', 'true');
      const bad = (f && f.limits && (f.limits[L.key] || {}).state === 'over') || tooMuch;
      say.classList.toggle('bad', !!bad);
      if (L.key === 'quality' && f) {
        const { row, low, high } = expected(form);
        const show = x => (least() ? x.toFixed(1) : x.toFixed(3));
        if (v === null) fill(say, (row && row.reason) || 'nothing known yet');
        else fill(say, h('b', { class: 'num' }, show(v)), ` (${show(low)} to ${show(high)}) ${unit()} expected`);
        say.title = v === null ? '' : `${row.reason}; 90 % interval`;
      } else if (v === null) fill(say, form.refused ? '' : 'forecasting');
      else if (L.key === 'minutes') fill(say, h('b', { class: 'num' }, mmss(v)), ' forecast');
      else if (L.key === 'memory_gb')
        fill(say, h('b', { class: 'num' }, gb(v * GB)), ` peak, ${phaseName(f.memory.peak_phase, true)}`);
      else if (L.key === 'trainable')
        fill(
          say,
          h('b', { class: 'num' }, count(f.trainable.count)),
          f.trainable.count ? `, ${percent(v)} of the weights` : ': nothing is trained',
        );
      else fill(say, h('b', { class: 'num' }, bytes(f.size.bytes)), f.size.exact === false ? ' on disk, about' : ' on disk');
      slider.setAttribute('aria-description', say.textContent);
    };
    const paint = () => {
      rescale();
      place();
      shown();
      field();
      segments();
    };
    root.paint = paint;

    slider.addEventListener('input', () => {
      held = true;
      let v = Math.max((slider.value / N) * max, L.part);
      if (L.key === 'minutes') {
        const unit = max <= 3 ? 1 / 60 : max <= 10 ? 1 / 12 : max <= 60 ? 0.25 : 1;
        v = Math.max(unit * (max <= 3 ? 5 : 1), Math.round(v / unit) * unit);
        v = +v.toFixed(6);
      } else v = +v.toPrecision(3);
      last = v;
      delete form.typed[path];
      delete form.errors[path];
      form.set(path, v, 'slide');
      place();
      shown();
      field();
      segments();
    });
    const release = () => {
      if (held) {
        held = false;
        paint();
      }
    };
    slider.addEventListener('change', release);
    slider.addEventListener('blur', release);
    box.addEventListener('change', () => {
      if (box.checked) {
        const v = value();
        form.set(path, form.get(path) ?? (L.key === 'quality' ? floorAt(v) : last !== L.start || v === null ? last : Math.max(L.start, +(v * 1.25).toPrecision(2))));
      } else {
        last = form.get(path) ?? last;
        form.set(path, undefined);
      }
      paint();
    });
    /* a first floor: what is expected, or a usual figure */
    const floorAt = v => (v === null ? (least() ? 90 : L.start) : least() ? Math.floor(v) : Math.ceil(v * 100) / 100);
    const remedy = `Give for example ${L.example}${L.unit ? NB + L.unit : ''}, or clear the box for no limit.`;
    input.addEventListener('input', () => {
      const t = input.value.trim(),
        v = t === '' ? NaN : L.read(t);
      if (!isFinite(v))
        return form.wrong(path, input.value, `“${t}” is not ${L.key === 'minutes' ? 'a time' : 'a number'}. ${remedy}`);
      if (v <= 0) return form.wrong(path, input.value, `A limit must be above zero. ${remedy}`);
      last = v;
      form.set(path, +v.toPrecision(9));
      rescale();
      place();
      segments();
    });
    input.addEventListener('blur', field);
    input.addEventListener('keydown', e => {
      if (e.key === 'Enter') input.blur();
    });
    form.bindError(path, input, err);
    return root;
  }

  fettle.parts.limitRows = form => LIMITS.map(L => limitRow(form, L));
})();
