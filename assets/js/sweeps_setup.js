/* Setting up a sweep: a base spec, the fields to vary, what to judge by, and how long it takes before Start.

   const setup = new fettle.SweepSetup(node, server, {boot, started: id => ...}); setup.open({run, specs}) */
(() => {
  'use strict';
  const F = window.fettle,
    h = F.el;
  const WORDS = {
    tpe: 'TPE',
    random: 'Random',
    grid: 'Grid',
    nsga2: 'NSGA-II',
    none: 'None',
    median: 'Median',
    hyperband: 'Hyperband',
    halving: 'Successive halving',
  };

  F.SweepSetup = class {
    constructor(node, server, on) {
      Object.assign(this, { node, server, on, specs: null, fields: [], turn: 0 });
      this.kept = F.keep('sweep-setup', null);
      this.build();
      this.forecast = F.debounce(() => this.ask(), 350);
    }
    build() {
      const { presets, samplers, pruners, objectives } = this.on.boot;
      const select = (label, options, chosen) =>
        h(
          'select',
          { class: 'ft-in ft-sel', 'aria-label': label, onchange: () => this.changed() },
          options.map(([v, t, help]) => h('option', { value: v, title: help, selected: v === chosen }, t)),
        );
      this.base = select('Base', [...presets.map(p => [p.id, p.id, p.title]), ['', 'own text']], presets[0]?.id);
      this.base.addEventListener('change', () => {
        const p = presets.find(p => p.id === this.base.value);
        if (p) this.text.value = p.yaml;
        this.suggest(true);
      });
      this.text = h('textarea', {
        class: 'ft-in sw-text',
        rows: 9,
        spellcheck: 'false',
        'aria-label': 'Base spec',
        oninput: () => ((this.base.value = ''), this.suggest(false), this.changed()),
      });
      this.text.value = presets[0]?.yaml || '';
      this.rows = h('div', { class: 'sw-rows' });
      this.paths = h('datalist', { id: 'sw-paths' });
      this.more = h(
        'button',
        {
          type: 'button',
          class: 'ft-btn quiet',
          onclick: () => (this.add('', ''), this.rows.lastChild.querySelector('input').focus()),
        },
        F.icon('plus'),
        'Add field',
      );
      this.chips = h(
        'span',
        { class: 'ft-chips', role: 'group', 'aria-label': 'Objectives' },
        Object.entries(objectives).map(([name, help]) =>
          h(
            'button',
            {
              type: 'button',
              class: 'ft-chip',
              title: help,
              'data-name': name,
              'aria-pressed': String(name === 'quality'),
              onclick: e => {
                const b = e.currentTarget;
                b.setAttribute('aria-pressed', b.getAttribute('aria-pressed') !== 'true');
                this.changed();
              },
            },
            F.sweepWord(name),
          ),
        ),
      );
      this.sampler = select(
        'Sampler',
        Object.entries(samplers).map(([k, v]) => [k, WORDS[k], v]),
        'tpe',
      );
      this.pruner = select(
        'Pruner',
        Object.entries(pruners).map(([k, v]) => [k, WORDS[k], v]),
        'none',
      );
      this.trials = h('input', {
        class: 'ft-in n',
        inputmode: 'numeric',
        value: '12',
        'aria-label': 'Trials',
        oninput: () => this.changed(),
      });
      this.minutes = h('input', {
        class: 'ft-in n',
        inputmode: 'decimal',
        placeholder: 'no limit',
        'aria-label': 'Minutes of the whole sweep',
        oninput: () => this.changed(),
      });
      this.on_ = h('input', {
        class: 'ft-in',
        placeholder: 'this machine',
        'aria-label': 'Ray cluster',
        spellcheck: 'false',
        onchange: () => this.changed(),
      });
      this.help = h('p', { class: 'sm mut' });
      this.say = h('div', { class: 'sw-say', role: 'status' });
      this.start = h(
        'button',
        { type: 'button', class: 'ft-btn primary big', onclick: () => this.begin() },
        F.icon('play'),
        'Start sweep',
      );
      this.copy = h(
        'button',
        { type: 'button', class: 'ft-btn quiet', onclick: () => this.command && F.copy(this.command) },
        F.icon('copy'),
        'Copy as command',
      );
      const label = (text, ...inner) => h('label', { class: 'sw-field' }, h('span', { class: 'dim sm' }, text), ...inner);
      this.listed = h('ol', { class: 'sw-specs' });
      this.over = h(
        'section',
        { class: 'ft-panel wide', 'data-span': 7 },
        h(
          'header',
          { class: 'ft-head' },
          h('span', { class: 'ft-step' }, '2'),
          h('h2', {}, 'Fields to vary'),
          h('span', { class: 'sub' }, '1e-4..1e-2:log or 2, 4, 8'),
          h('span', { class: 'ft-tools' }, this.more),
        ),
        h('div', { class: 'ft-body' }, this.rows, this.listed, this.paths),
      );
      this.basePanel = h(
        'section',
        { class: 'ft-panel wide', 'data-span': 5 },
        h(
          'header',
          { class: 'ft-head' },
          h('span', { class: 'ft-step' }, '1'),
          h('h2', {}, 'Base'),
          h('span', { class: 'ft-tools' }, this.base),
        ),
        h('div', { class: 'ft-body' }, this.text),
      );
      F.replace(
        this.node,
        h(
          'div',
          { class: 'ft-grid' },
          this.basePanel,
          this.over,
          h(
            'section',
            { class: 'ft-panel wide', 'data-span': 12 },
            h(
              'header',
              { class: 'ft-head' },
              h('span', { class: 'ft-step' }, '3'),
              h('h2', {}, 'Objectives and end'),
              h('span', { class: 'ft-tools' }, this.chips),
            ),
            h(
              'div',
              { class: 'ft-body' },
              h(
                'div',
                { class: 'sw-ends' },
                label('Sampler', this.sampler),
                label('Stop hopeless trials', this.pruner),
                label('Trials', this.trials),
                label('Minutes in all', this.minutes),
                label('Ray cluster', this.on_),
              ),
              this.help,
              this.say,
              h('div', { class: 'row wrap sw-go' }, this.start, this.copy),
            ),
          ),
        ),
      );
    }
    async open({ run, specs } = {}) {
      this.node.hidden = false;
      if (this.opened) return;
      this.opened = true;
      try {
        if (specs) {
          const found = await F.call(this.server, 'base', { specs });
          this.specs = specs;
          F.replace(
            this.listed,
            found.specs.map(t => h('li', {}, t)),
          );
          this.rows.hidden = this.more.hidden = true;
          this.over.querySelector('h2').textContent = `${specs.length} specs, one trial each`;
          this.over.querySelector('.sub').textContent = 'from Recommend';
          this.over.dataset.span = 12;
          this.basePanel.hidden = true;
          this.trials.value = String(specs.length);
          this.sampler.closest('label').hidden = true;
        } else if (run) {
          this.text.value = (await F.call(this.server, 'base', { run: Number(run) })).yaml;
          this.base.value = '';
        } else if (this.kept) this.restore();
      } catch (e) {
        if (!(e instanceof F.ServerError)) throw e;
        F.note(this.say, 'bad', e.text);
      }
      await this.suggest(!this.rows.children.length);
    }
    /* fields of the base with proposals; fresh: the first two become rows */
    async suggest(fresh) {
      if (this.specs) return this.changed();
      const turn = ++this.turn;
      try {
        const found = await F.call(this.server, 'fields', { yaml: this.text.value });
        if (turn !== this.turn) return;
        this.fields = found.fields;
        F.replace(
          this.paths,
          found.fields.map(f => h('option', { value: f.path }, f.help)),
        );
        if (fresh) {
          this.rows.replaceChildren();
          const first = found.fields.find(f => /\.rank$|\.sparsity$|\.bits$/.test(f.path)) || found.fields[0];
          for (const f of [first, found.fields.find(f => f.path === 'training.lr')]) if (f) this.add(f.path, f.values);
        }
      } catch (e) {
        if (!(e instanceof F.ServerError)) throw e;
      }
      this.changed();
    }
    add(path, values) {
      const field = h('input', {
          class: 'ft-in',
          list: 'sw-paths',
          value: path,
          placeholder: 'training.lr',
          'aria-label': 'Field',
          spellcheck: 'false',
        }),
        range = h('input', {
          class: 'ft-in',
          value: values,
          placeholder: '1e-4..1e-2:log',
          'aria-label': 'Values',
          spellcheck: 'false',
          oninput: () => this.changed(),
        }),
        hint = h('span', { class: 'sm dim hint' });
      const tell = () => F.text(hint, this.fields.find(f => f.path === field.value)?.help || '');
      field.addEventListener('input', () => {
        const known = this.fields.find(f => f.path === field.value);
        if (known) range.value = known.values;
        tell();
        this.changed();
      });
      const row = h(
        'div',
        { class: 'sw-row' },
        field,
        range,
        h(
          'button',
          {
            type: 'button',
            class: 'ft-btn icon',
            'aria-label': 'Remove this field',
            onclick: () => (row.remove(), this.changed()),
          },
          F.icon('cross'),
        ),
        hint,
      );
      this.rows.append(row);
      tell();
    }
    given() {
      const number = i => (i.value.trim() === '' ? null : Number(i.value.replace(',', '.')));
      const over = [...this.rows.children].map(r => {
        const [p, v] = r.querySelectorAll('input');
        return { path: p.value, values: v.value };
      });
      const trials = number(this.trials),
        minutes = number(this.minutes);
      return {
        yaml: this.text.value,
        specs: this.specs,
        over,
        objectives: [...this.chips.querySelectorAll('[aria-pressed="true"]')].map(b => b.dataset.name),
        sampler: this.sampler.value,
        pruner: this.pruner.value,
        trials: Number.isNaN(trials) ? this.trials.value : trials,
        minutes: Number.isNaN(minutes) ? this.minutes.value : minutes,
        on: this.on_.value.trim() || null,
      };
    }
    restore() {
      const k = this.kept;
      this.text.value = k.yaml;
      this.base.value = k.base;
      for (const r of k.over) this.add(r.path, r.values);
      for (const b of this.chips.children) b.setAttribute('aria-pressed', String(k.objectives.includes(b.dataset.name)));
      this.sampler.value = k.sampler;
      this.pruner.value = k.pruner;
      this.trials.value = k.trials ?? '';
      this.minutes.value = k.minutes ?? '';
      this.on_.value = k.on || '';
    }
    changed() {
      const { samplers, pruners } = this.on.boot;
      F.text(
        this.help,
        this.specs
          ? pruners[this.pruner.value] + '.'
          : `${WORDS[this.sampler.value]}: ${samplers[this.sampler.value]}. Pruner: ${pruners[this.pruner.value]}.`,
      );
      if (!this.specs) F.keep.set('sweep-setup', { ...this.given(), base: this.base.value });
      this.forecast();
    }
    async ask() {
      const turn = (this.asking = (this.asking || 0) + 1);
      try {
        const found = await F.call(this.server, 'forecast', this.given(), { timeout: 30000 });
        if (turn !== this.asking) return;
        this.command = found.command;
        F.note(
          this.say,
          found.infeasible ? 'warn' : 'info',
          found.text,
          found.why ? h('span', { class: 'mut' }, ' ' + found.why) : null,
        );
        this.start.disabled = false;
      } catch (e) {
        if (!(e instanceof F.ServerError)) throw e;
        if (turn !== this.asking) return;
        F.note(this.say, 'bad', e.text);
        this.start.disabled = true;
      }
    }
    async begin() {
      this.start.disabled = true;
      try {
        const row = await F.call(this.server, 'start', this.given(), { retry: false, timeout: 60000 });
        dispatchEvent(new Event('fettle-changed'));
        F.keep.set('sweep-setup', undefined);
        this.on.started(row.sweep);
      } catch (e) {
        if (!(e instanceof F.ServerError)) throw e;
        F.note(this.say, 'bad', e.text);
      }
      this.start.disabled = false;
    }
  };
})();
