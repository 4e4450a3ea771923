/* The one state of New run: the spec, what was typed and refused, and the server's forecast of it.
   The spec is the same mapping that a YAML file holds; nothing about the form lives anywhere else. */
fettle.parts = fettle.parts || {};
(() => {
  'use strict';
  const { sentence, debounce } = fettle.form;
  const DRAFT = 'fettle.draft';

  class Form {
    constructor(server, root) {
      this.server = server;
      this.root = root;
      this.listeners = {};
      this.spec = null;
      this.boot = null;
      this.forecast = null;
      this.refused = null;
      this.typed = {}; // path -> text that could not be read; kept so that nothing typed is lost
      this.errors = {}; // path -> sentence
      this.view = {}; // what is open and chosen in the panels, kept with the draft
      this.sent = 0;
      this.shown = 0;
      this.flying = false;
      this.again = false;
      this.save = debounce(() => this.keep(), 250);
    }
    on(what, f) {
      (this.listeners[what] = this.listeners[what] || []).push(f);
      return this;
    }
    tell(what, ...a) {
      for (const f of this.listeners[what] || []) f(...a);
    }

    method(id) {
      return this.boot.methods.find(m => m.id === id);
    }
    switch(id) {
      return this.boot.switches.find(m => m.id === id);
    }
    stageName(i) {
      const s = this.spec.pipeline[i],
        m = s && this.method(s.method);
      return m ? m.name : s ? s.method : '';
    }

    /* a bundled image model with bundled texts (or the reverse) cannot run: the other one follows, and that is said */
    pair(what) {
      const image = x => (x.task || '').startsWith('image'),
        source = typeof this.spec.data === 'string' ? this.spec.data : this.spec.data.source;
      const m = this.boot.models.find(x => x.id === this.spec.model),
        d = this.boot.data.find(x => x.id === source);
      if (!m || !d || image(m) === image(d)) return;
      const [kept, others, key] = what === 'model' ? [m, this.boot.data, 'data'] : [d, this.boot.models, 'model'];
      const usual = key === 'data' ? this.boot.spec.data : this.boot.spec.model,
        fitting = others.filter(x => image(x) === image(kept)),
        other = fitting.find(x => x.id === usual) || fitting[0];
      if (!other) return;
      this.spec[key] = other.id;
      this.clear(key);
      this.changed('all');
      const [name, verb] = key === 'data' ? ['Data', 'reads'] : ['Model', 'holds'];
      this.status(`${name} is now ${other.id}: ${kept.id} ${verb} ${image(kept) ? 'images' : 'text'}.`);
    }
    get(path) {
      return path.split('.').reduce((n, k) => (n === undefined || n === null ? undefined : n[k]), this.spec);
    }
    /* set a dotted path; undefined removes it. `quiet` leaves rebuilding to the caller (a slider that moves). */
    set(path, value, what = 'value') {
      const parts = path.split('.');
      let n = this.spec;
      for (const k of parts.slice(0, -1)) {
        if (k === 'data' && typeof n.data === 'string') n.data = { source: n.data };
        n = n[k] = n[k] === undefined || n[k] === null ? {} : n[k];
      }
      if (value === undefined) delete n[parts[parts.length - 1]];
      else n[parts[parts.length - 1]] = value;
      this.clear(path);
      this.changed(what, path);
    }
    /* what was typed at path cannot be used: say so there, keep the text and the last good value */
    wrong(path, text, message) {
      this.typed[path] = text;
      this.errors[path] = message;
      this.save();
      this.tell('errors');
      this.tell('forecast');
    }
    clear(path) {
      if (!(path in this.errors) && !(path in this.typed)) return;
      delete this.errors[path];
      delete this.typed[path];
      this.tell('errors');
    }
    changed(what = 'value', path = '') {
      this.save();
      this.tell('change', what, path);
      if (what === 'pipeline' || what === 'all') this.tell(what);
      if (what === 'all') this.tell('pipeline');
      this.plan();
    }
    replace(spec, typed = {}) {
      this.spec = Object.assign({ budget: {}, pipeline: [], seed: 0 }, spec);
      this.spec.pipeline = this.spec.pipeline.map(s => this.complete(s));
      const on = (this.spec.training || {}).switches;
      if (on) this.spec.training = { ...this.spec.training, switches: [].concat(on).map(s => this.complete(s)) };
      this.typed = typed;
      this.errors = {};
      this.refused = null;
      this.forecast = null;
      this.changed('all');
    }
    /* a stage with every hyperparameter present, so that each field shows what will be used */
    complete(stage) {
      const s = typeof stage === 'string' ? { method: stage } : { ...stage },
        m = this.method(s.method) || this.switch(s.method);
      for (const f of m ? m.hyperparameters : []) if (!(f.name in s)) s[f.name] = f.default;
      return s;
    }
    keep() {
      try {
        localStorage.setItem(
          DRAFT,
          JSON.stringify({
            spec: this.spec,
            typed: this.typed,
            view: this.view,
            errors: Object.fromEntries(Object.keys(this.typed).map(k => [k, this.errors[k]])),
          }),
        );
      } catch (e) {
        /* private mode: no draft */
      }
    }
    draft() {
      try {
        return JSON.parse(localStorage.getItem(DRAFT) || 'null');
      } catch (e) {
        return null;
      }
    }

    /* forecast, 40 ms after the last change; one question in flight, and only the newest answer is painted */
    plan() {
      clearTimeout(this.timer);
      if (this.asked === undefined) this.asked = performance.now();
      this.timer = setTimeout(() => this.ask(), 40);
    }
    async ask() {
      if (this.flying) {
        this.again = true;
        return;
      }
      this.flying = true;
      const t0 = this.asked;
      this.asked = undefined;
      const answer = await this.server.plan({ spec: this.spec });
      this.flying = false;
      if (answer.lost) {
        this.refused = { lost: true, text: 'The workbench does not answer; the settings are kept in this browser.' };
        clearTimeout(this.retry);
        this.retry = setTimeout(() => this.ask(), 2000);
      } else if (answer.error) {
        this.refused = this.place(answer.error);
        this.forecast = null;
      } else {
        this.refused = null;
        this.forecast = answer;
      }
      this.dropRefusals();
      this.tell('errors');
      this.tell('forecast');
      if (t0 !== undefined) this.root.dataset.forecastMs = (performance.now() - t0).toFixed(1);
      this.root.dataset.forecasts = String(++this.shown);
      if (this.again) {
        this.again = false;
        this.ask();
      } else if (this.forecast && this.forecast.verdict === 'over') {
        clearTimeout(this.remedy);
        this.remedy = setTimeout(() => this.askRemedies(), 150);
      }
    }
    /* the smallest changes that fit take the planner a dozen forecasts: asked for when the handle rests */
    async askRemedies() {
      const spec = JSON.stringify(this.spec),
        answer = await this.server.plan({ spec: this.spec, remedies: true });
      if (answer.error || spec !== JSON.stringify(this.spec) || !this.forecast) return;
      this.forecast.changes = answer.changes;
      this.tell('forecast');
    }
    /* where on the page a refusal belongs: lora.rank -> pipeline.1.rank, pipeline[1] -> pipeline.1, data.text ... */
    place(error) {
      let path = String(error.field || '').replace(/\[(\d+)\]/g, '.$1');
      const [head, field] = path.split('.'),
        P = this.spec.pipeline;
      if (!['pipeline', 'budget', 'training', 'data', 'model', 'seed', 'name', 'task'].includes(head)) {
        const same = P.findIndex(s => s.method === head && (!field || JSON.stringify(s[field]) === JSON.stringify(error.value)));
        const any = same >= 0 ? same : P.findIndex(s => s.method === head || (field === undefined && head in s));
        if (any >= 0) path = field ? `pipeline.${any}.${field}` : head in P[any] ? `pipeline.${any}.${head}` : `pipeline.${any}`;
      }
      const switched = ((this.spec.training || {}).switches || []).findIndex(s => s.method === head);
      if (switched >= 0 && field) path = `training.switches.${switched}.${field}`;
      if (path === 'data.source') path = 'data';
      return { ...error, path, text: sentence(error) };
    }
    dropRefusals() {
      for (const k of Object.keys(this.errors)) if (!(k in this.typed)) delete this.errors[k];
      if (this.refused && this.refused.path) this.errors[this.refused.path] = this.refused.text;
    }
    /* an error beside the field `input`: colours it, writes the sentence, keeps both in step */
    bindError(path, input, line) {
      line.id = line.id || 'e' + Math.random().toString(36).slice(2, 9);
      line.classList.add('nr-err');
      const paint = () => {
        if (!line.isConnected && paint.seen) {
          this.listeners.errors = this.listeners.errors.filter(f => f !== paint);
          return;
        }
        paint.seen = line.isConnected;
        const text = this.errors[path] || '';
        if (line.textContent !== text) line.textContent = text;
        line.hidden = !text;
        if (text) {
          input.setAttribute('aria-invalid', 'true');
          input.setAttribute('aria-describedby', line.id);
        } else {
          input.removeAttribute('aria-invalid');
          input.removeAttribute('aria-describedby');
        }
      };
      this.on('errors', paint);
      paint();
    }
    get blocked() {
      const bad = Object.keys(this.errors);
      if (bad.length) return this.errors[bad[0]];
      if (this.refused) return this.refused.text;
      if (!this.spec || !this.spec.pipeline.length) return 'Add a stage to the pipeline first.';
      return '';
    }
  }

  fettle.parts.Form = Form;
})();
