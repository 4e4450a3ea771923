/* What is known of the run on the page, and the one call that keeps it up to date. Panels listen; none asks the server. */
(() => {
  'use strict';
  const F = window.fettle;
  const ACTIVE = ['queued', 'starting', 'running', 'paused'];
  F.liveEnded = s => ['finished', 'stopped', 'failed', 'lost'].includes(s);

  F.LiveBus = class {
    constructor(server) {
      Object.assign(this, { server, listeners: [], generation: 0, series: new Map(), events: [], log: '', wake: null });
      document.addEventListener('visibilitychange', () => this.poke());
    }
    on(name, f) {
      this.listeners.push([name, f]);
    }
    tell(name, detail) {
      for (const [n, f] of this.listeners)
        if (n === name)
          try {
            f(this, detail);
          } catch (e) {
            console.error(`live ${name}`, e);
          }
    }
    call(name, given, options) {
      return F.call(this.server, name, given, options);
    }
    async act(what, more = {}) {
      const row = await this.call('act', { run: this.run.id, what, ...more }, { retry: false });
      Object.assign(this.run, row);
      this.tell('tick', { changed: new Map(), state: true });
      dispatchEvent(new Event('fettle-changed'));
      this.poke();
    }
    /* seconds of the run's own clock; it stands still while paused and between ticks goes on by itself */
    now() {
      const r = this.run;
      if (!r) return 0;
      let t = Math.max(r.seconds || 0, this.lastT || 0);
      if (r.status === 'running' && r.heartbeat)
        t = Math.max(t, Math.min((r.seconds || 0) + (Date.now() / 1000 + this.skew - r.heartbeat), (this.lastT || 0) + 3));
      else if (r.status === 'starting' && r.started) t = Math.max(t, Date.now() / 1000 + this.skew - r.started);
      return Math.max(0, t);
    }
    /* unix time of an event to the run's clock, which stands still between a pause (or a loss) and the resume after it */
    at(unix) {
      const r = this.run;
      if (!r.started) return 0;
      const resumed = this.events.filter(e => e.kind === 'resume').map(e => e.t);
      let away = 0;
      if (resumed.length) {
        const wall = (r.ended || r.heartbeat || r.started) - r.started;
        away = (Math.max(0, wall - (r.seconds || 0)) * resumed.filter(t => t <= unix + 0.5).length) / resumed.length;
      }
      return Math.max(0, Math.min(unix - r.started - away, Math.max(this.now(), 0.01)));
    }
    get limits() {
      return this.run?.spec?.budget || {};
    }
    get forecast() {
      return this.run?.forecast || null;
    }
    get total() {
      const f = this.forecast;
      return f?.seconds ? (f.seconds.total ?? f.seconds) : null;
    }
    get limitSeconds() {
      const m = this.limits.minutes;
      return F.finite(m) ? m * 60 : null;
    }
    /* left_seconds is the run's: the stage that trains and what comes after it, as of the last heartbeat */
    get left() {
      const r = this.run;
      if (r?.status !== 'running' || !F.finite(r.left_seconds)) return null;
      return Math.max(0, r.left_seconds - Math.max(0, Math.min(3, Date.now() / 1000 + this.skew - (r.heartbeat || 0))));
    }
    get live() {
      return ACTIVE.includes(this.run?.status);
    }
    s(name) {
      return this.series.get(name) || { step: [], value: [], t: [] };
    }
    last(name) {
      const s = this.series.get(name);
      if (!s) return null;
      for (let i = s.value.length - 1; i >= 0; i--) if (s.value[i] !== null) return s.value[i];
      return null;
    }
    has(name) {
      return (this.series.get(name)?.step.length || 0) > 0;
    }

    async open(id) {
      const mine = ++this.generation;
      const found = await this.call('open_run', id ? { run: id } : {});
      if (mine !== this.generation) return;
      this.take(found);
      this.loop(mine);
    }
    take(found) {
      this.skew = found.now ? found.now - Date.now() / 1000 : 0;
      this.machine = found.machine || this.machine;
      this.run = found.none ? null : found.run;
      this.info = found;
      this.series = new Map(Object.entries(found.series || {}));
      this.units = found.units || {};
      this.lastT = 0;
      for (const s of this.series.values()) this.lastT = Math.max(this.lastT, s.t.at(-1) || 0);
      this.events = found.events || [];
      this.layers = found.layers || null;
      this.stages = found.stages || [];
      this.evaluations = found.evaluations || [];
      this.place = found.place;
      this.log = found.log || '';
      this.marks = {
        cursor: found.cursor,
        epoch: found.epoch,
        event_cursor: found.event_cursor,
        layer_cursor: found.layer_cursor,
        log_offset: found.log_offset,
        stamp: '',
      };
      this.tell('open');
    }
    async loop(mine) {
      while (mine === this.generation) {
        if (!this.run) return;
        const ended = F.liveEnded(this.run.status);
        /* the server holds the call until there is news; a hidden or ended run is asked seldom */
        const pause = document.hidden ? 2000 : ended ? 2500 : 20;
        await new Promise(ok => {
          const t = setTimeout(ok, pause);
          this.wake = () => {
            clearTimeout(t);
            ok();
          };
        });
        this.wake = null;
        if (mine !== this.generation) return;
        if (document.hidden && ended) continue;
        let news;
        try {
          news = await this.call('since', {
            run: this.run.id,
            ...this.marks,
            status: this.run.status,
            phase: this.run.phase,
            wait: ended ? 0 : 1,
          });
        } catch (e) {
          if (mine !== this.generation) return;
          this.tell('error', e);
          await F.sleep(2000);
          continue;
        }
        if (mine !== this.generation) return;
        if (news.same) {
          this.tell('idle');
          continue;
        }
        if (news.epoch !== this.marks.epoch) {
          await this.open(this.run.id);
          return;
        }
        this.merge(news);
      }
    }
    poke() {
      this.wake?.();
    }
    merge(news) {
      const before = this.run.status;
      this.skew = news.now - Date.now() / 1000;
      Object.assign(this.run, news.run);
      const changed = new Map();
      for (const [name, add] of Object.entries(news.series)) {
        let s = this.series.get(name);
        if (!s) this.series.set(name, (s = { step: [], value: [], t: [] }));
        let from = s.step.length,
          i = 0;
        /* a step that came again replaces what was there */
        while (from > 0 && s.step[from - 1] >= add.step[0]) from--;
        if (from < s.step.length) {
          s.step.length = s.value.length = s.t.length = from;
          changed.set(name, -1);
        }
        for (; i < add.step.length; i++) {
          s.step.push(add.step[i]);
          s.value.push(add.value[i]);
          s.t.push(add.t[i]);
        }
        if (!changed.has(name)) changed.set(name, from);
        this.lastT = Math.max(this.lastT, s.t.at(-1) || 0);
      }
      if (news.events.length) this.events = this.events.concat(news.events).slice(-500);
      const old = this.layers?.figures;
      if (news.layers) this.layers = { ...news.layers, figures: { ...news.layers.figures, ...old, ...news.layers.figures } };
      if (news.stages) this.stages = news.stages;
      if (news.evaluations) this.evaluations = news.evaluations;
      if (news.log) this.log += news.log;
      if (this.log.length > 400000) this.log = this.log.slice(-300000).replace(/^[^\n]*\n/, '');
      this.place = news.place ?? null;
      Object.assign(this.marks, {
        cursor: news.cursor,
        epoch: news.epoch,
        event_cursor: news.event_cursor,
        layer_cursor: news.layer_cursor,
        log_offset: news.log_offset,
        stamp: news.stamp,
      });
      const state = before !== this.run.status;
      this.tell('tick', {
        changed,
        events: news.events.length > 0,
        layers: !!news.layers,
        log: !!news.log,
        evaluations: !!news.evaluations,
        state,
      });
      if (state) {
        this.tell('state', before);
        dispatchEvent(new Event('fettle-changed'));
      }
    }
  };
})();
