/* The pipeline strip: stages in order, each with its hyperparameters and what the forecast says of it.
   Stages are rebuilt only when their order changes; a forecast writes into the nodes that are there. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, iconButton, button, NB, note, dtype } = fettle.form,
    { setting } = fettle.parts;
  const { whole: count, size: bytes, count: short, clock, percent, fig: sig, icon, family: familyIcon } = fettle,
    fill = fettle.replace;

  function stageCard(form, i, moves) {
    const s = form.spec.pipeline[i],
      m = form.method(s.method),
      n = form.spec.pipeline.length;
    const info = () => (form.forecast && form.forecast.stages && form.forecast.stages[i]) || null;
    const rows = (m ? m.hyperparameters : []).map(f =>
      setting(form, f, `pipeline.${i}.${f.name}`, () => {
        const st = info();
        return st ? { value: (st.settings || {})[f.name], why: (st.reasons || {})[f.name] } : null;
      }),
    );
    const advanced = rows.filter((r, k) => m.hyperparameters[k].advanced),
      main = rows.filter(r => !advanced.includes(r));
    const say = h('p', { class: 'note' });
    const left = iconButton(`Move stage ${i + 1} earlier`, 'i-left', () => moves.move(i, i - 1, 'left')),
      right = iconButton(`Move stage ${i + 1} later`, 'i-right', () => moves.move(i, i + 1, 'right'));
    left.dataset.do = 'left';
    right.dataset.do = 'right';
    left.disabled = i === 0;
    right.disabled = i === n - 1;
    const foot = [h('span', { class: 'num' }), h('span', { class: 'num' }), h('span', { class: 'num' })];
    const line = h('p', { role: 'alert', class: 'nr-stage-err' });
    const head = h(
      'header',
      { draggable: 'true', title: 'Drag to reorder' },
      h('span', { class: 'dim num sm' }, String(i + 1)),
      h('span', { class: 'fam' }, familyIcon(m && m.family)),
      h('h3', { title: m ? m.summary : '' }, m ? m.name : s.method),
      h('span', { class: 'grow' }),
      left,
      right,
      iconButton(`Remove stage ${i + 1}, ${m ? m.name : s.method}`, 'i-cross', () => moves.remove(i)),
    );
    const fold = advanced.length
      ? h(
          'details',
          { class: 'nr-more', open: form.view['more' + s.method] },
          h('summary', null, `${advanced.length} more`),
          h('div', { class: 'nr-sets' }, ...advanced),
        )
      : null;
    if (fold)
      fold.addEventListener('toggle', () => {
        form.view['more' + s.method] = fold.open;
        form.save();
      });
    const card = h(
      'article',
      { class: 'ft-stage', 'data-stage': i, 'aria-label': `Stage ${i + 1}, ${m ? m.name : s.method}` },
      head,
      h('div', { class: 'set' }, h('div', { class: 'nr-sets' }, ...main), fold, say, line),
      h('footer', null, ...foot),
    );
    head.addEventListener('dragstart', e => {
      e.dataTransfer.setData('text/plain', String(i));
      e.dataTransfer.effectAllowed = 'move';
      moves.dragging = i;
      card.classList.add('drag');
    });
    head.addEventListener('dragend', () => {
      moves.dragging = null;
      card.classList.remove('drag');
      moves.mark(null);
    });
    card.addEventListener('dragover', e => {
      if (moves.dragging === null || moves.dragging === undefined) return;
      e.preventDefault();
      const b = card.getBoundingClientRect(),
        column = getComputedStyle(card.parentNode).flexDirection === 'column';
      moves.mark(i + ((column ? e.clientY > b.top + b.height / 2 : e.clientX > b.left + b.width / 2) ? 1 : 0));
    });
    card.addEventListener('drop', e => {
      e.preventDefault();
      moves.drop();
    });
    form.bindError(`pipeline.${i}`, card, line);
    card.update = () => {
      rows.forEach(r => r.update());
      const st = info();
      foot[0].textContent = st ? clock(st.seconds) : '–';
      foot[1].textContent = st && st.peak_bytes ? bytes(st.peak_bytes) : '–';
      foot[2].textContent =
        !st || !st.after_bytes
          ? '–'
          : st.before_bytes && Math.abs(st.before_bytes - st.after_bytes) / st.before_bytes > 0.001
            ? `${bytes(st.before_bytes)} → ${bytes(st.after_bytes)}`
            : `${bytes(st.after_bytes)}${m && m.trains ? ' merged' : ' still'}`;
      const f = form.forecast,
        parts = st
          ? [
              st.trainable ? `${count(st.trainable)} trainable` : '',
              st.steps ? `${count(st.steps)} steps` : '',
              st.steps && st.units ? `${short(st.units)} ${f.units || 'tokens'}` : '',
              st.sparsity > 0.0005 ? `${percent(st.sparsity)} zeros` : '',
              m && m.packs && st.bits_per_weight ? `${sig(st.bits_per_weight)} bits/weight` : '',
            ].filter(Boolean)
          : [];
      say.textContent = parts.join(', ');
      say.hidden = !parts.length;
    };
    card.rows = rows;
    return card;
  }

  /* settings of the training loop, shared by every stage that trains */
  function training(form) {
    const box = h('div', { class: 'nr-train' }),
      switches = fettle.parts.switches(form);
    const build = () => {
      const who = form.spec.pipeline.map((s, i) => [form.method(s.method), i + 1]).filter(([m]) => m && m.trains);
      box.rows = [];
      if (!who.length) {
        box.hidden = true;
        fill(box);
        return;
      }
      box.hidden = false;
      const make = f =>
        setting(form, f, 'training.' + f.name, () => {
          const t = (form.forecast && form.forecast.training) || {};
          return f.name in t ? { value: t[f.name] } : null;
        });
      const main = form.boot.training.filter(f => !f.advanced).map(make),
        more = form.boot.training.filter(f => f.advanced).map(make);
      box.rows = [...main, ...more];
      const fold = h(
        'details',
        { class: 'nr-more', open: form.view.moreTraining },
        h('summary', null, `${more.length} more training settings`),
        h('div', { class: 'nr-sets' }, ...more),
      );
      fold.addEventListener('toggle', () => {
        form.view.moreTraining = fold.open;
        form.save();
      });
      switches.build();
      const on = () => (form.get('training.switches') || []).map(s => (form.switch(s.method) || { name: s.method }).name);
      const turn = h('summary', null),
        turns = h('details', { class: 'nr-more', open: form.view.switches ?? on().length > 0 }, turn, switches);
      box.switched = () => {
        const text = `Switches: ${on().join(', ') || 'none on'}`;
        if (turn.textContent !== text) turn.textContent = text;
      };
      box.switched();
      turns.addEventListener('toggle', () => {
        form.view.switches = turns.open;
        form.save();
      });
      fill(
        box,
        h('p', { class: 'ft-h' }, 'Training ', h('span', { class: 'sub' }, `of stage ${who.map(([, i]) => i).join(', ')}`)),
        h('div', { class: 'nr-sets' }, ...main),
        fold,
        turns,
      );
    };
    box.build = build;
    box.update = () => {
      box.switched();
      [...box.rows, ...switches.rows].forEach(r => r.update());
    };
    return box;
  }

  fettle.parts.pipeline = function (form, panel) {
    const strip = h('div', { class: 'ft-strip nr-strip' }),
      body = panel.querySelector('.ft-body');
    const sub = panel.querySelector('.ft-head .sub'),
      order = panel.querySelector('.nr-order'),
      train = training(form);
    const live = h('span', { class: 'vh', role: 'status' });
    fill(body, strip, train, live);
    let cards = [];
    const add = panel.querySelector('.nr-add');
    add.addEventListener('click', () => {
      const m = form.root.querySelector('.nr-methods'),
        s = m.querySelector('input');
      m.scrollIntoView({ block: 'start', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth' });
      s.focus({ preventScroll: true });
    });
    /* what was typed and refused goes along with its stage; to(i) is where stage i is now, or null */
    const shift = to => {
      for (const bag of [form.typed, form.errors]) {
        const old = Object.entries(bag).filter(([k]) => k.startsWith('pipeline.'));
        old.forEach(([k]) => delete bag[k]);
        for (const [k, v] of old) {
          const [, i, f] = k.split('.'),
            n = to(+i);
          if (n !== null && f && `pipeline.${i}.${f}` === k) bag[`pipeline.${n}.${f}`] = v;
        }
      }
    };
    const moves = {
      dragging: null,
      target: null,
      move(i, to, focus) {
        const P = form.spec.pipeline;
        if (to < 0 || to >= P.length) return;
        shift(k => (k === i ? to : k > i && k <= to ? k - 1 : k < i && k >= to ? k + 1 : k));
        P.splice(to, 0, P.splice(i, 1)[0]);
        live.textContent = `${form.stageName(to)} is now stage ${to + 1} of ${P.length}`;
        form.changed('pipeline');
        if (focus) {
          const b =
            cards[to].querySelector(`[data-do="${focus}"]:not(:disabled)`) || cards[to].querySelector('[data-do]:not(:disabled)');
          if (b) b.focus();
        }
      },
      remove(i) {
        const name = form.stageName(i);
        shift(k => (k === i ? null : k > i ? k - 1 : k));
        form.spec.pipeline.splice(i, 1);
        live.textContent = `${name} removed`;
        form.changed('pipeline');
        const next = cards[Math.min(i, cards.length - 1)];
        (next ? next.querySelector('[aria-label^="Remove"]') : add).focus();
      },
      mark(at) {
        moves.target = at;
        cards.forEach((c, k) => {
          c.classList.toggle('before', at === k);
          c.classList.toggle('after', at === cards.length && k === cards.length - 1);
        });
      },
      drop() {
        const from = moves.dragging;
        let to = moves.target;
        moves.mark(null);
        moves.dragging = null;
        if (from === null || to === null) return;
        if (to > from) to--;
        if (to !== from) moves.move(from, to);
      },
    };
    /* where a method sensibly goes: prune, then train, then pack */
    form.addStage = id => {
      const rank = m => (m.packs ? 2 : m.trains ? 1 : 0),
        P = form.spec.pipeline,
        m = form.method(id);
      let at = P.length;
      while (at > 0 && rank(form.method(P[at - 1].method) || {}) > rank(m)) at--;
      shift(k => (k >= at ? k + 1 : k));
      P.splice(at, 0, form.complete({ method: id }));
      live.textContent = `${m.name} added as stage ${at + 1}`;
      form.changed('pipeline');
      return at;
    };
    const start = h('div', { class: 'ft-end' }),
      end = h('div', { class: 'ft-end r' });
    const build = () => {
      const P = form.spec.pipeline;
      cards = P.map((s, i) => stageCard(form, i, moves));
      train.build();
      const flow = () => h('div', { class: 'ft-flow', 'aria-hidden': 'true' });
      if (!cards.length)
        fill(
          strip,
          h(
            'div',
            { class: 'ft-empty nr-none' },
            h('h3', null, 'No stage yet'),
            h(
              'p',
              null,
              'A pipeline is a list of methods in order, such as prune, recover, quantize. Add one from the cards below.',
            ),
            button('Add stage', 'i-plus', () => add.click()),
          ),
        );
      else fill(strip, start, flow(), ...cards.flatMap(c => [c, flow()]), end);
      const kinds = {
        pruning: 'prune',
        quantization: 'quantize',
        adaptation: 'adapt',
        distillation: 'distil',
        kv_cache: 'compress the cache',
      };
      let pruned = false;
      sub.textContent = P.map(s => {
        const m = form.method(s.method);
        if (!m) return s.method;
        const was = pruned;
        pruned = pruned || m.family === 'pruning';
        return m.family === 'adaptation' && was ? 'recover' : kinds[m.family];
      }).join(', ');
      paint();
    };
    const paint = () => {
      cards.forEach(c => c.update());
      if (!train.hidden) train.update();
      const f = form.forecast,
        p = form.profile,
        P = form.spec.pipeline,
        bad = form.refused && /^pipeline(\.\d+)?$/.test(form.refused.path || '');
      fill(
        start,
        h('span', { class: 'b ell', title: form.spec.model }, String(form.spec.model).split('/').pop()),
        p ? h('span', { class: 'num' }, bytes(p.size_bytes), h('span', { class: 'u' }, ', ' + dtype(p.dtype))) : null,
        p
          ? h('span', { class: 'num mut' }, short(p.parameters).replace(NB, ' '), h('span', { class: 'u' }, ' parameters'))
          : null,
      );
      const z = f && f.size;
      fill(
        end,
        h('span', { class: 'b' }, 'Result'),
        z ? h('span', { class: 'num' }, bytes(z.bytes)) : h('span', { class: 'dim' }, '–'),
        z && z.before_bytes
          ? h('span', { class: 'num mut' }, sig(z.bytes / z.before_bytes), h('span', { class: 'u' }, ' × size'))
          : null,
        z && z.bits_per_weight ? h('span', { class: 'dim mi num' }, sig(z.bits_per_weight) + ' bits/weight') : null,
        z && z.sparsity > 0.0005 ? h('span', { class: 'dim mi num' }, percent(z.sparsity) + ' zeros') : null,
      );
      const masks = P.some(
        (s, i) => (form.method(s.method) || {}).masks && P.slice(i + 1).some(t => (form.method(t.method) || {}).trains),
      );
      order.className = 'ft-verdict plain nr-order';
      order.dataset.v = bad ? 'no' : 'yes';
      order.hidden = !P.length || (!bad && !f);
      fill(
        order,
        icon(bad ? 'i-cross' : 'i-check'),
        h(
          'span',
          null,
          bad ? 'This order cannot run' : 'Order is valid',
          !bad && masks ? h('span', { class: 'only-wide' }, '; the mask survives the training') : null,
        ),
      );
      panel.classList.toggle('has-fix', !!bad);
      const fix = panel.querySelector('.nr-fix');
      if (bad && P.some((s, i) => i < P.length - 1 && (form.method(s.method) || {}).packs)) {
        const k = P.findIndex(s => (form.method(s.method) || {}).packs);
        fill(
          fix,
          note('bad', h('b', null, `${form.stageName(k)} cannot come before ${form.stageName(k + 1)}. `), form.refused.text),
          (form.method(P[k + 1].method) || {}).packs
            ? button(`Remove ${form.stageName(k)}`, null, () => moves.remove(k))
            : button(`Move ${form.stageName(k)} to the end`, null, () => moves.move(k, P.length - 1)),
        );
        fix.hidden = false;
      } else {
        fix.hidden = true;
        fill(fix);
      }
    };
    form
      .on('pipeline', build)
      .on('forecast', () => {
        if (cards.length === form.spec.pipeline.length) paint();
      })
      .on('profile', paint);
  };
})();
