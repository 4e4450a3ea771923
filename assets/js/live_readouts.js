/* Live: one line of figures, each with its limit and its forecast on one small gauge. */
(() => {
  'use strict';
  const F = window.fettle;
  F.livePanels = F.livePanels || [];
  const gauge = () => {
    const g = F.el(
      'div',
      { class: 'ft-gauge' },
      F.el('i', { class: 'fill' }),
      F.el('i', { class: 'over' }),
      F.el('i', { class: 'fc' }),
      F.el('i', { class: 'lim' }),
    );
    return g;
  };

  F.livePanels.push((root, bus) => {
    const host = root.querySelector('[data-part="readouts"]');
    const cells = {};
    for (const [k, lab] of [
      ['time', 'Time left'],
      ['eval', 'Evaluation, held out'],
      ['memory', 'Memory'],
      ['rate', 'Throughput'],
      ['trainable', 'Trainable'],
      ['size', 'Size on disk'],
      ['energy', 'Energy'],
    ]) {
      const c = {
        lab: F.el('span', { class: 'lab' }, lab),
        val: F.el('span', { class: 'val num' }),
        g: gauge(),
        a: F.el('span', { class: 'note num' }),
        b: F.el('span', { class: 'note num' }),
      };
      c.node = F.el('div', { class: 'ft-readout', 'data-k': k }, c.lab, c.val, c.g, c.a, c.b);
      cells[k] = c;
      host.append(c.node);
    }
    const show = (
      k,
      { lab, value, unit, a = '', b = '', measured = null, forecast = null, limit = null, scale = null, none = false },
    ) => {
      const c = cells[k];
      if (lab) F.text(c.lab, lab);
      const key = value + '|' + unit;
      if (c.key !== key) {
        c.key = key;
        F.replace(c.val, value, unit ? F.el('span', { class: 'u' }, ' ' + unit) : null);
      }
      c.val.classList.toggle('dim', none);
      const top = scale ?? Math.max(limit ?? 0, forecast ?? 0, measured ?? 0) * (limit ? 1.1 : 1.15);
      const useful = top > 0 && (limit !== null || forecast !== null || none);
      c.g.hidden = !useful && !none;
      c.g.classList.toggle('none', none);
      const set = (n, v) => c.g.style.setProperty(n, Math.max(0, Math.min(1, v)).toFixed(4));
      if (useful) {
        set('--v', (measured ?? 0) / top);
        set('--fc', (forecast ?? 0) / top);
        set('--lim', limit !== null ? limit / top : 1);
      }
      c.g.querySelector('.fc').hidden = forecast === null || none;
      for (const x of ['.lim', '.over']) c.g.querySelector(x).hidden = limit === null || none;
      c.g.querySelector('.fill').hidden = measured === null || none;
      c.g.classList.toggle('over-limit', limit !== null && measured !== null && measured > limit);
      F.text(c.a, a);
      F.text(c.b, b);
      c.a.title = a;
      c.b.title = b;
      c.b.hidden = !b;
    };
    const GB = 1e9;

    const paint = () => {
      const r = bus.run;
      if (!r) return;
      const f = bus.forecast || {},
        L = bus.limits,
        ended = F.liveEnded(r.status),
        foot = r.footprint || {};
      /* time */
      const now = bus.now(),
        limit = bus.limitSeconds,
        total = F.finite(bus.total) ? bus.total : null;
      const left = bus.left;
      // As it is written: a run that ends with its limit, some hundredths later, has kept it.
      const clocked = Math.round(ended || r.status === 'paused' ? (r.seconds ?? now) : now);
      if (ended || r.status === 'paused')
        show('time', {
          lab: 'Time used',
          value: F.clock(clocked),
          measured: clocked,
          forecast: total,
          limit,
          a: total
            ? `forecast ${F.clock(total)}${limit ? `, limit ${F.clock(limit)}` : ''}`
            : limit
              ? `limit ${F.clock(limit)}`
              : '',
        });
      else if (r.status === 'queued')
        show('time', {
          lab: 'Time',
          value: total ? F.clock(total) : 'not yet',
          unit: total ? 'forecast' : '',
          forecast: total,
          limit,
          a: limit ? `limit ${F.clock(limit)}` : 'no limit',
        });
      else
        show('time', {
          lab: 'Time left',
          value: left !== null ? F.clock(left) : total ? F.clock(Math.max(0, total - now)) : 'not yet',
          unit: left === null && total ? 'forecast' : '',
          measured: clocked,
          forecast: total,
          limit,
          a: [
            `${F.clock(clocked)} used`,
            left !== null ? `, ends at ${F.clock(now + left)}` : '',
            limit ? ` of ${F.clock(limit)}` : '',
          ].join(''),
        });
      /* quality */
      const evals = bus.evaluations.filter(e => F.finite(e.value)),
        e = evals.at(-1),
        base = evals.find(x => x.stage < 0);
      if (e) {
        const unit = e.metric === 'accuracy' ? '%' : e.metric,
          v = F.pct(e.metric, e.value);
        const before = evals.filter(x => x !== e && x.name !== 'during').slice(-2);
        show('eval', {
          value: v,
          unit,
          a: `± ${F.pct(e.metric, (e.high - e.low) / 2)} at 95${F.NB}%, n${F.NB}=${F.NB}${F.whole(e.n)}`,
          b: [
            base && base !== e ? `base ${F.pct(e.metric, base.value)}` : '',
            ...before
              .filter(x => x !== base)
              .map(x => `${bus.stages[x.stage] ? 'after ' + bus.stages[x.stage].name : x.name} ${F.pct(e.metric, x.value)}`),
          ]
            .filter(Boolean)
            .join(', '),
        });
      } else
        show('eval', {
          value: 'not yet',
          unit: '',
          none: false,
          a: r.status === 'queued' ? 'made while it runs' : 'the first comes with the loaded model',
        });
      /* memory */
      const gpu = bus.has('mem/process')
        ? ['mem/process', 'Memory, NVML process']
        : bus.has('mem/reserved')
          ? ['mem/reserved', 'Memory, reserved']
          : ['mem/rss', 'Memory, resident set'];
      const series = bus.s(gpu[0]),
        used = bus.last(gpu[0]);
      let peak = r.peak_bytes ?? null;
      for (let i = bus.peakFrom || 0; i < series.value.length; i++)
        if (series.value[i] > (bus.peakSeen || 0)) bus.peakSeen = series.value[i];
      bus.peakFrom = series.value.length;
      if (bus.peakSeen) peak = Math.max(peak || 0, bus.peakSeen);
      const fm = f.memory?.peak_bytes ?? null,
        lm = F.finite(L.memory_gb) ? L.memory_gb * GB : null;
      const shown = ended ? peak : used;
      show('memory', {
        lab: gpu[1] + (ended && shown ? ', peak' : shown ? '' : ', forecast'),
        value: shown ? F.fixed(shown / GB, 2) : fm ? F.fixed(fm / GB, 2) : 'not yet',
        unit: shown || fm ? (lm ? `of ${F.fixed(lm / GB, 2)}${F.NB}GB` : 'GB') : '',
        measured: shown,
        forecast: fm,
        limit: lm,
        a: [
          fm ? `forecast ${F.fixed(fm / GB, 2)}` : '',
          fm && peak
            ? `peak ${peak >= fm ? '+' : '−'}${Math.abs(Math.round(100 * (peak / fm - 1)))}${F.NB}%`
            : peak
              ? `peak ${F.fixed(peak / GB, 2)}`
              : '',
        ]
          .filter(Boolean)
          .join(', '),
      });
      /* throughput */
      const name = bus.has('samples_per_second') ? 'samples_per_second' : 'tokens_per_second',
        what = name[0] === 's' ? 'samples/s' : 'tokens/s';
      const rates = bus.s(name),
        recent = F.median(rates.value.slice(-20)) ?? (ended && F.finite(r.tokens_per_second) ? r.tokens_per_second : null);
      const resting = !ended && rates.t.length && now - rates.t.at(-1) > 3;
      const times = ['forward', 'backward', 'step', 'data'].map(k => F.median(bus.s('time/' + k).value.slice(-50)) || 0),
        whole = times.reduce((a, b) => a + b, 0);
      const tr = f.training || {};
      if (recent) {
        const [v, u] = F.countParts(recent);
        show('rate', {
          value: v,
          unit: `${u ? u + ' ' : ''}${what}`.trim(),
          a: [
            whole ? `${F.fig(1 / whole)} steps/s` : '',
            tr.batch ? `batch ${tr.batch}${tr.length && name[0] === 't' ? ` × ${tr.length}` : ''}` : '',
          ]
            .filter(Boolean)
            .join(', '),
          b: resting ? `now: ${r.phase || 'no training step'}` : '',
        });
      } else
        show('rate', {
          value: 'not yet',
          unit: '',
          a: tr.batch ? `batch ${tr.batch}${tr.length ? ` × ${tr.length}` : ''}` : '',
          b: r.phase && !ended ? `now: ${r.phase}` : '',
        });
      /* trainable */
      const tn = bus.last('trainable') ?? r.trainable,
        ft = f.trainable?.count ?? null,
        params = r.parameters ?? f.parameters ?? (f.trainable?.share ? ft / f.trainable.share : null);
      let lt = L.trainable ?? null;
      if (F.finite(lt) && lt <= 1 && params) lt = lt * params;
      const first = bus.s('trainable').value.find(F.finite);
      if ((F.finite(tn) && tn > 0) || (F.finite(ft) && ft > 0))
        show('trainable', {
          lab: F.finite(tn) ? 'Trainable' + (bus.live ? ' now' : '') : 'Trainable, forecast',
          value: F.whole(tn ?? ft),
          unit: params ? F.percent((tn ?? ft) / params) : '',
          measured: F.finite(tn) ? tn : null,
          forecast: ft,
          limit: F.finite(lt) ? lt : null,
          a: ft !== null ? `forecast ${F.whole(ft)}` : '',
          b: F.finite(first) && first !== tn ? `${F.whole(first)} at start` : '',
        });
      else show('trainable', { value: 'none', unit: '', a: 'no stage trains' });
      /* size */
      const size = r.size_bytes,
        fs = f.size?.bytes ?? null,
        before = f.size?.before_bytes ?? null,
        ls = F.finite(L.size_mb) ? L.size_mb * 1e6 : null;
      const [sv, su] = F.sizeParts(size ?? fs);
      if (F.finite(size ?? fs))
        show('size', {
          lab: 'Size on disk',
          value: sv,
          unit: su,
          measured: F.finite(size) ? size : null,
          forecast: fs,
          limit: ls,
          scale: before && !ls ? Math.max(before, size || 0) * 1.02 : null,
          a: [
            F.finite(size) ? (fs ? (size === fs ? 'as forecast' : `forecast ${F.size(fs)}`) : 'measured') : 'forecast',
            before ? `${F.fixed((size ?? fs) / before, 2)} × base` : '',
          ]
            .filter(Boolean)
            .join('; '),
        });
      else show('size', { value: 'not yet', unit: '', a: 'known when it is saved' });
      /* energy */
      const joules = bus.last('energy/joules') ?? foot.joules ?? null,
        watts = bus.last('gpu/power'),
        lj = F.finite(L.joules) ? L.joules : null;
      if (F.finite(joules)) {
        const [jv, ju] = joules >= 1000 ? [F.fig(joules / 1000), 'kJ'] : [F.fig(joules), 'J'],
          tokens = bus.last('tokens');
        show('energy', {
          value: jv,
          unit: ju,
          measured: joules,
          limit: lj,
          a: [watts ? `${F.fig(watts)}${F.NB}W now` : '', now ? `${F.fig(joules / now)}${F.NB}W mean` : '']
            .filter(Boolean)
            .join(', '),
          b: [
            tokens ? `${F.fig((1000 * joules) / tokens)}${F.NB}mJ per token` : '',
            lj ? `limit ${F.fig(lj)}${F.NB}J` : 'no limit',
          ]
            .filter(Boolean)
            .join(', '),
        });
      } else
        show('energy', {
          value: 'no counter',
          unit: '',
          none: true,
          a:
            bus.machine?.energy && !/^no energy/.test(bus.machine.energy) && r.status === 'queued'
              ? bus.machine.energy
              : 'none on this machine',
        });
      cells.energy.val.classList.toggle('small', !F.finite(joules));
    };
    bus.on('open', () => {
      bus.peakSeen = bus.peakFrom = 0;
      paint();
    });
    bus.on('tick', (b, d) => {
      for (const [name, from] of d.changed) if (from < 0 && name.startsWith('mem/')) bus.peakFrom = 0;
      paint();
    });
    bus.on('idle', paint);
  });

  /* accuracy is a share or already in per cent: both are shown in per cent, one place; bits/byte with three */
  F.pct = (metric, v) => (metric === 'accuracy' ? F.fixed(Math.abs(v) <= 1.0001 ? 100 * v : v, 1) : F.fixed(v, 3));
})();
