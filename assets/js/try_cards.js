/* The columns of the Try page: one per variant, filled from the events of a request.

   const cards = new fettle.TryCards(box, state);     // state: {mode, blind, voted, ...}, shared with the page
   cards.reset(variants, prompt); cards.event(e); cards.paint(); */
(() => {
  'use strict';
  const F = window.fettle,
    NB = F.NB;
  const LETTERS = 'ABCD';
  const NONE = '\u2013';
  const PATHS = {
    circle: 'M0-4A4 4 0 1 1 0 4A4 4 0 1 1 0-4Z',
    square: 'M-3.6-3.6H3.6V3.6H-3.6Z',
    diamond: 'M0-5 5 0 0 5-5 0Z',
    'triangle-up': 'M0-5 4.6 3.6H-4.6Z',
    'triangle-down': 'M0 5 4.6-3.6H-4.6Z',
  };
  /* a base model is no run: it has ink, no colour */
  const BASE = { css: 'var(--ft-ink-2)', symbol: 'triangle-down', dash: 'solid' };
  const look = v => (v && v.slot !== null && v.slot !== undefined ? F.run(v.slot) : BASE);
  const marker = v =>
    F.svg(
      'svg',
      { class: 'ft-mk', width: 10, height: 10, viewBox: '-5 -5 10 10', 'aria-hidden': 'true' },
      F.svg('path', { d: PATHS[look(v).symbol], style: `fill:${look(v).css}` }),
    );
  F.variant = { LETTERS, PATHS, look, marker };

  /* 1.2 nats: a token of probability 0.30; 6 nats: 0.0025 */
  const span = s => (s < 0.1 ? F.unit(1000 * s, 'ms', 2) : F.unit(s, 's', 2));
  const shade = nats => (nats < 1.2 ? 0 : Math.min(1, 0.25 + (0.75 * (nats - 1.2)) / 4.8));
  const token = ([, piece, nats]) => {
    const s = shade(nats),
      title = `${nats.toFixed(2)} nats, probability ${F.fig(Math.exp(-nats))}`;
    return F.el('i', { style: s ? `--s:${s.toFixed(2)}` : null, title }, piece);
  };

  class Card {
    constructor(variant, i, prompt, page) {
      Object.assign(this, {
        v: variant,
        i,
        page,
        tokens: [],
        text: '',
        given: prompt,
        figures: {},
        state: 'wait',
        error: null,
        word: 'Waiting',
      });
      this.letter = LETTERS[i];
      this.head = F.el('div', { style: 'min-width:0' });
      this.nums = F.el('div', { class: 'nums num' });
      this.out = F.el('p', { class: 'out', 'aria-live': 'off' }, F.el('span', { class: 'given' }, prompt));
      this.probs = F.el('div', { class: 'ft-probs' });
      this.body = F.el('div', { style: 'display:contents' }, page.state.mode === 'generate' ? this.out : this.probs);
      this.status = F.el('span', { class: 'row', style: 'min-width:0' });
      this.note = F.el('span', { class: 'dim ell' });
      const copy = () => F.copy(this.given + this.text);
      const label = `Copy the text of ${this.letter}`;
      this.copy = F.el(
        'button',
        { type: 'button', class: 'ft-btn icon', 'aria-label': label, title: label, onclick: copy },
        F.icon('copy'),
      );
      this.tag = F.el('span', { class: 'ft-tag auto', hidden: true }, 'your vote');
      this.root = F.el(
        'article',
        { class: 'ft-panel ft-var', 'data-ref': variant.ref, 'aria-label': `Variant ${this.letter}` },
        F.el('header', { class: 'ft-head' }, F.el('span', { class: 'let' }, this.letter), this.head, this.tag),
        this.nums,
        this.body,
        F.el('footer', {}, this.status, this.note, page.state.mode === 'generate' ? this.copy : null),
      );
    }
    get done() {
      return this.state === 'done';
    }
    get voted() {
      return this.page.state.voted === this.i;
    }
    paint() {
      this.paintHead();
      this.paintFoot();
    }
    paintHead() {
      const secret = this.page.hidden();
      this.root.style.setProperty('--c', secret ? 'var(--ft-line-strong)' : look(this.v).css);
      if (secret)
        F.replace(this.head, F.el('h2', {}, `Variant ${this.letter}`), F.el('span', { class: 'sub' }, 'named after your vote'));
      else
        F.replace(
          this.head,
          F.el('h2', { class: 'row', style: 'gap:6px' }, marker(this.v), this.v.name),
          F.el('span', { class: 'sub', title: this.v.text }, this.v.text),
        );
      F.replace(this.nums, secret ? F.el('span', { class: 'dim' }, 'speed, memory and size after your vote') : this.numbers());
      this.root.toggleAttribute('data-voted', this.voted);
      this.tag.hidden = !this.voted;
    }
    numbers() {
      const f = this.figures,
        write = this.page.state.mode === 'generate';
      const one = ([x, unit], title) => F.el('span', { title }, F.el('b', {}, x), F.el('span', { class: 'u' }, unit));
      const held = f.weight_bytes ? F.sizeParts(f.weight_bytes + (f.kv_bytes || 0)) : [NONE, 'MB'];
      const stored = this.v.size_bytes ? one(F.sizeParts(this.v.size_bytes), 'Stored size') : null;
      if (!write)
        return [
          one([F.finite(f.first_ms) ? F.fig(f.first_ms) : NONE, 'ms'], 'Time of one item, warm'),
          one(held, 'Weights in memory'),
          stored,
        ];
      return [
        one(
          [F.finite(f.tokens_per_second) ? F.fig(f.tokens_per_second) : NONE, 'tok/s'],
          'New tokens per second after the first',
        ),
        one(held, 'Weights and KV cache in memory'),
        stored,
        one([F.finite(f.nats) ? f.nats.toFixed(2) : NONE, 'nats/tok'], 'Mean surprise of its own tokens, at temperature 1'),
      ];
    }
    paintFoot() {
      const f = this.figures,
        n = this.tokens.length,
        secret = this.page.hidden();
      let glyph = { wait: 'queued', going: 'running' }[this.state] || 'starting',
        words = this.word;
      if (this.error) [glyph, words] = ['failed', 'No result'];
      else if (this.done && this.page.state.mode === 'classify') [glyph, words] = this.judged();
      else if (this.done && f.stop === 'you') [glyph, words] = ['stopped', `Stopped at ${n} tokens`];
      else if (this.done) {
        const end = { 'end of text': ', end of text', 'context full': ', context full' }[f.stop] || '';
        [glyph, words] = ['finished', `${n} tokens${secret ? '' : ` in ${span(f.seconds)}`}${end}`];
      }
      F.replace(this.status, F.state(glyph, words));
      F.text(this.note, this.done && !secret ? this.parting() : '');
      this.copy.disabled = !this.text;
    }
    judged() {
      const { truth, best } = this.figures;
      if (truth === null || truth === undefined) return ['finished', 'Classified'];
      return truth === best ? ['finished', 'Right'] : ['failed', `Wrong: it is ${truth}`];
    }
    /* where its tokens part from the earlier variant that it follows the longest */
    parting() {
      let best = null;
      for (const other of this.page.list) {
        if (other.i >= this.i) continue;
        let n = 0;
        while (n < other.tokens.length && n < this.tokens.length && other.tokens[n][0] === this.tokens[n][0]) n++;
        if (n > 0 && (!best || n > best.n)) best = { n, other };
      }
      if (!best) return '';
      const whole = best.n === this.tokens.length && best.n === best.other.tokens.length;
      return whole ? `the same as ${best.other.letter}` : `parts from ${best.other.letter} at token ${best.n + 1}`;
    }
    add(list) {
      const low = this.out.scrollHeight - this.out.scrollTop - this.out.clientHeight < 30;
      const caret = this.out.querySelector('.caret') || F.el('span', { class: 'caret', 'aria-hidden': 'true' });
      for (const t of list) {
        this.tokens.push(t);
        this.text += t[1];
      }
      caret.remove();
      this.out.append(...list.map(token), ...(this.done ? [] : [caret]));
      if (low) this.out.scrollTop = this.out.scrollHeight;
    }
    probabilities(p) {
      F.replace(
        this.probs,
        p.slice(0, 6).map(([name, x], k) => [
          F.el(
            'span',
            { class: 'lab ' + (k ? '' : 'top'), title: name },
            this.figures.truth === name ? F.icon('check', 's') : null,
            name,
          ),
          F.el('span', { class: 'bar' }, F.el('i', { style: `--v:${x}` })),
          F.el('span', { class: 'num r' }, F.fixed(100 * x, 1) + NB + '%'),
        ]),
      );
    }
    fail(words) {
      this.state = 'done';
      this.error = words;
      F.note(this.body, 'bad', words);
      this.paintFoot();
    }
    event({ v, t, s, p, error, ...figures }) {
      Object.assign(this.figures, figures);
      if (s === 'loading') [this.state, this.word] = ['load', 'Loading the weights'];
      if (s === 'ready') [this.state, this.word] = ['ready', 'Loaded'];
      if (s === 'error') this.fail(error);
      if (s === 'done') {
        this.state = 'done';
        this.out.querySelector('.caret')?.remove();
        this.out.setAttribute('aria-live', 'polite');
      }
      if (t) {
        [this.state, this.word] = ['going', 'Writing'];
        this.add(t);
      }
      if (p) {
        this.figures.best = p[0][0];
        this.probabilities(p);
      }
      this.paintFoot();
      if (s) this.paintHead();
    }
  }

  F.TryCards = class {
    constructor(box, state) {
      Object.assign(this, { box, state, list: [] });
    }
    get length() {
      return this.list.length;
    }
    /* names and figures are kept back until the vote */
    hidden() {
      return this.state.mode === 'generate' && this.state.blind && this.list.length > 1 && this.state.voted === undefined;
    }
    reset(variants, prompt) {
      this.list = variants.map((v, i) => new Card(v, i, prompt, this));
      F.replace(
        this.box,
        this.list.map(c => c.root),
      );
      this.paint();
    }
    clear() {
      this.list = [];
      F.replace(this.box);
    }
    paint() {
      for (const c of this.list) c.paint();
    }
    event(e) {
      if (e.s === 'end') return this.fail(e.error || 'The process stopped before this variant was done. Generate again.');
      this.list[e.v]?.event(e);
    }
    /* every variant that is not done has no result */
    fail(words) {
      for (const c of this.list) if (!c.done) c.fail(words);
    }
    waiting(seconds) {
      for (const c of this.list)
        if (c.state === 'wait') {
          c.word = `Starting the process, ${seconds}${NB}s`;
          c.paintFoot();
        }
    }
    get written() {
      return this.list.filter(c => c.text).length;
    }
    get measured() {
      return this.list.filter(c => c.done && !c.error && c.figures.tokens_per_second);
    }
  };
})();
