/* New run's first row (preset, name, seed, copies) and its last (start, queue, command). */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { h, button, sentence, debounce, parseNumber, note } = fettle.form,
    fill = fettle.replace,
    icon = fettle.icon;

  /* ---- first row: preset, name, seed, copies ---- */
  function titleRow(form, at) {
    const S = form.server;
    const choose = async id => {
      const got = await S.preset({ name: id });
      if (got.error) {
        status(sentence(got.error));
        return;
      }
      form.view.preset = id;
      form.replace({ ...structuredClone(got.spec), name: form.spec.name });
    };
    const preset = h('select', { class: 'ft-in ft-sel nr-preset', onchange: () => choose(preset.value) });
    const back = h(
      'button',
      {
        type: 'button',
        class: 'ft-btn quiet nr-back',
        title: 'Back to the preset as it was saved',
        hidden: true,
        onclick: () => {
          choose(form.view.preset);
          preset.focus();
        },
      },
      'Changed, reset',
    );
    const plain = o =>
      JSON.stringify(o, (k, v) =>
        v && typeof v === 'object' && !Array.isArray(v)
          ? Object.fromEntries(
              Object.entries(v)
                .filter(([, x]) => x !== null && x !== undefined)
                .sort(),
            )
          : v,
      );
    const compare = () => {
      const p = form.boot.presets.find(x => x.id === form.view.preset);
      back.hidden =
        !p ||
        !form.spec ||
        plain({ ...p.spec, name: null, pipeline: p.spec.pipeline.map(s => form.complete(s)) }) ===
          plain({ ...form.spec, name: null });
    };
    const options = () => {
      const own = form.boot.presets.filter(p => p.own),
        bundled = form.boot.presets.filter(p => !p.own);
      const opt = p => h('option', { value: p.id }, p.title || p.id);
      fill(preset, ...bundled.map(opt), own.length ? h('optgroup', { label: 'Saved here' }, ...own.map(opt)) : null);
      if (!form.boot.presets.some(p => p.id === form.view.preset))
        preset.prepend(h('option', { value: '', disabled: true }, 'Your settings'));
      preset.value = form.boot.presets.some(p => p.id === form.view.preset) ? form.view.preset : '';
    };
    const name = h('input', {
      class: 'ft-in nr-name',
      'aria-label': 'Name of the run',
      maxlength: 80,
      spellcheck: 'false',
      oninput: () => {
        form.view.named = true;
        form.set('name', name.value.trim() || undefined);
      },
    });
    const seedLine = h('span', { role: 'alert' });
    const seed = h('input', {
      class: 'ft-in n nr-seed',
      inputmode: 'numeric',
      'aria-label': 'Seed',
      oninput: () => {
        const v = parseNumber(seed.value);
        if (!Number.isInteger(v) || v < 0 || v >= 2 ** 31)
          form.wrong('seed', seed.value, 'Not a whole number from 0 to 2,147,483,647. Give for example 0.');
        else form.set('seed', v);
      },
    });
    const live = h('span', { class: 'vh', role: 'status' }),
      line = h('span', { class: 'sm mut nr-said' });
    const status = t => {
      line.textContent = live.textContent = t;
      clearTimeout(status.t);
      status.t = setTimeout(() => (line.textContent = ''), 8000);
    };
    form.status = status;

    const yaml = button(
      'Copy as YAML',
      'i-copy',
      async () => {
        const got = await S.as_text({ spec: form.spec });
        if (got.error) return status(sentence(got.error));
        fettle.copy(got.yaml, 'Copied as YAML');
      },
      'quiet nr-yaml',
    );
    const box = h('form', {
      class: 'nr-pop',
      hidden: true,
      onsubmit: async e => {
        e.preventDefault();
        const got = await S.save_preset({ name: field.value, spec: form.spec });
        if (got.error) {
          why.textContent = sentence(got.error);
          field.setAttribute('aria-invalid', 'true');
          field.focus();
          return;
        }
        form.boot.presets = got.presets;
        form.view.preset = got.id;
        options();
        compare();
        form.save();
        close();
        status(`Saved as ${got.id}.`);
      },
      onkeydown: e => {
        if (e.key === 'Escape') close();
      },
    });
    const field = h('input', {
      class: 'ft-in',
      'aria-label': 'Name of the preset',
      placeholder: 'prune-half-then-int8',
      maxlength: 60,
      oninput: () => {
        why.textContent = '';
        field.removeAttribute('aria-invalid');
      },
    });
    const why = h('span', { class: 'nr-err', role: 'alert' });
    box.append(h('span', { class: 'row' }, field, h('button', { class: 'ft-btn primary' }, 'Save preset')), why);
    const close = () => {
      box.hidden = true;
      save.setAttribute('aria-expanded', 'false');
      save.focus();
    };
    const save = button(
      'Save preset',
      'i-save',
      () => {
        box.hidden = !box.hidden;
        save.setAttribute('aria-expanded', String(!box.hidden));
        if (!box.hidden) {
          field.value =
            form.view.preset && form.boot.presets.some(p => p.own && p.id === form.view.preset) ? form.view.preset : '';
          field.focus();
        }
      },
      'quiet',
    );
    save.setAttribute('aria-expanded', 'false');
    fill(
      at,
      h('h1', null, 'New run'),
      h('label', { class: 'row nr-f1' }, h('span', { class: 'dim sm' }, 'Preset'), preset),
      back,
      h('label', { class: 'row nr-f2' }, h('span', { class: 'dim sm' }, 'Name'), name),
      h('label', { class: 'row nr-f3' }, h('span', { class: 'dim sm' }, 'Seed'), seed),
      seedLine,
      line,
      live,
      h('span', { class: 'grow' }),
      yaml,
      h('span', { class: 'nr-anchor' }, save, box),
    );
    form.bindError('seed', seed, seedLine);
    form.on('all', () => {
      options();
      name.value = form.spec.name || '';
      seed.value = 'seed' in form.typed ? form.typed.seed : form.spec.seed;
    });
    form.on('change', compare).on('pipeline', compare);
    form.on('renamed', () => {
      name.value = form.spec.name || '';
    });
  }

  /* ---- start, queue, command ---- */
  function actions(form, at, dock) {
    const S = form.server;
    const over = () => !!form.forecast && form.forecast.verdict === 'over';
    const go = async queue => {
      const reason = form.blocked;
      if (reason) {
        say('bad', reason);
        focusFirstError();
        return;
      }
      busy(true);
      const got = await S.start({ spec: form.spec, queue, force: over(), parent: form.parent || null });
      busy(false);
      if (got.error) {
        const r = typeof got.error === 'string' ? { text: got.error } : form.place(got.error);
        if (r.path) form.errors[r.path] = r.text;
        form.tell('errors');
        say('bad', r.text);
        return;
      }
      form.view.named = false;
      dispatchEvent(new Event('fettle-changed'));
      if (got.next_name) {
        form.spec.name = got.next_name;
        form.tell('renamed');
      }
      form.keep();
      if (!queue) {
        fettle.go('/live', { run: got.run });
        return;
      }
      say(
        'good',
        h('b', null, got.name),
        got.place ? ` is queued, ${got.place}. ` : ' is queued. ',
        h('a', { href: '/live?run=' + encodeURIComponent(got.run) }, 'Watch it'),
      );
    };
    const focusFirstError = () => {
      const f = form.root.querySelector('[aria-invalid="true"]');
      if (f) {
        f.focus();
        f.scrollIntoView({ block: 'center' });
      }
    };
    const starts = [
      button('Start run', 'i-play', () => go(false), 'primary big grow nr-start'),
      button('Start run', 'i-play', () => go(false), 'primary'),
    ];
    const queues = [button('Queue', null, () => go(true), 'big nr-queue'), button('Queue', null, () => go(true))];
    const code = h('code'),
      cmd = h(
        'button',
        {
          type: 'button',
          class: 'ft-btn icon',
          'aria-label': 'Copy as command',
          title: 'Copy as command',
          onclick: async () => {
            const got = await S.as_text({ spec: form.spec });
            if (got.error) return say('bad', sentence(got.error));
            fettle.copy(got.command, 'Command copied');
          },
        },
        icon('i-copy'),
      );
    const out = h('div', { class: 'nr-out', role: 'status' });
    const say = (kind, ...text) => fill(out, note(kind, ...text));
    fill(at, starts[0], queues[0], out, h('div', { class: 'ft-copy' }, code, cmd));
    const dv = h('span', { class: 'v b row' }),
      dn = h('span', { class: 'sm mut num grow' });
    fill(dock, h('div', { class: 'row' }, dv, dn, queues[1], starts[1]));
    const busy = on =>
      [...starts, ...queues].forEach(b => {
        b.disabled = on;
        b.setAttribute('aria-busy', String(on));
      });
    const text = debounce(async () => {
      const got = await S.as_text({ spec: form.spec });
      if (got && got.command) {
        code.textContent = got.command;
        code.title = got.command;
      }
    }, 350);
    form.on('change', text);
    form.on('all', () => fill(out));
    form.on('forecast', () => {
      const reason = form.blocked,
        v = form.verdict || {};
      starts.forEach(b => {
        b.toggleAttribute('aria-disabled', !!reason);
        b.title = reason;
        b.classList.toggle('nr-blocked', !!reason);
        b.querySelector('.lab').textContent = over() && !reason ? 'Start anyway' : 'Start run';
      });
      queues.forEach(b => {
        b.toggleAttribute('aria-disabled', !!reason);
        b.title = reason;
        b.classList.toggle('nr-blocked', !!reason);
        b.querySelector('.lab').textContent = over() && !reason ? 'Queue anyway' : 'Queue';
      });
      fill(dv, icon(v.icon || 'i-info'), v.word || 'Forecast');
      dv.className = 'v b row ' + (v.kind || '');
      fill(dn, ...(v.dock || []).flatMap((t, i) => (i ? [h('br'), t] : [t])));
      if (!reason && out.querySelector('.bad')) fill(out);
    });
  }

  Object.assign(fettle.parts, { titleRow, actions });
})();
