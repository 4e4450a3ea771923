/* Which is best? Blind as long as names are hidden; each vote is kept with its texts and settings.

   const vote = new fettle.TryVote($, cards, state, {busy, paint, keep, kept}); vote.cast(1); vote.paint(); */
(() => {
  'use strict';
  const F = window.fettle;
  const key = t => F.el('span', { class: 'ft-kbd' }, t);

  F.TryVote = class {
    constructor($, cards, state, on) {
      Object.assign(this, { $, cards, state, on, total: 0, skipped: false });
    }
    get ready() {
      return this.state.mode === 'generate' && !this.on.busy() && this.cards.written > 1;
    }
    get open() {
      return this.ready && this.state.voted === undefined;
    }
    /* winner: place of a variant, null for a tie, 'skip' for no vote */
    async cast(winner) {
      if (!this.open) return;
      const was = this.state.sent,
        texts = this.cards.list.map(c => c.text);
      this.skipped = winner === 'skip';
      this.state.voted = this.skipped ? null : winner;
      this.on.paint();
      if (this.skipped) return;
      const { prompt, refs, settings, blind } = was;
      try {
        const found = await this.on.keep({ prompt, refs, settings, winner, texts, blind });
        this.total = found.total;
        this.on.kept(found);
      } catch (e) {
        F.toast(e.text, 'bad');
        this.state.voted = undefined;
      }
      this.on.paint();
    }
    words() {
      const blind = this.state.sent && this.state.sent.blind;
      if (this.state.voted !== undefined && this.skipped) return 'Not kept. Generate again for the next vote.';
      if (this.state.voted !== undefined)
        return blind ? 'Kept. Generate again for the next vote.' : 'Kept. Names were shown, so it is not counted as preference.';
      if (this.on.busy()) return 'You can vote when all have written.';
      const how = blind
        ? 'Names appear after the vote; the order is shuffled each time.'
        : 'With names shown a vote is kept, but not counted as preference.';
      return [F.el('span', { class: 'only-wide' }, 'Keys ', key('1'), ' to ', key(String(this.cards.length)), '. '), how];
    }
    button(words, winner) {
      const mine = this.state.voted !== undefined && !this.skipped && this.state.voted === winner;
      const act = () => this.cast(winner);
      return F.el(
        'button',
        {
          type: 'button',
          class: `ft-btn v ${mine ? 'primary' : ''}`,
          disabled: !this.open && !mine,
          'aria-pressed': mine,
          onclick: act,
        },
        words,
      );
    }
    paint() {
      const n = this.total,
        skip = () => this.cast('skip');
      this.$('[data-vote-panel]').hidden = this.state.mode !== 'generate' || this.cards.length < 2;
      F.replace(
        this.$('[data-vote]'),
        F.el('b', {}, 'Which is best?'),
        this.cards.list.map(c => this.button(c.letter, c.i)),
        this.button('Tie', null),
        this.open ? F.el('button', { type: 'button', class: 'ft-btn quiet', onclick: skip }, 'Skip') : null,
        F.el('span', { class: 'sm mut' }, this.words()),
        F.el('span', { class: 'grow' }),
        F.el('span', { class: 'sm mut num' }, `${n.toLocaleString('en-US')}${F.NB}${n === 1 ? 'vote' : 'votes'} kept`),
      );
    }
  };
})();
