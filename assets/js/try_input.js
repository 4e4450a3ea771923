/* What goes into a request of the Try page: prompt and numbers, an item of the evaluation data, an uploaded image. */
(() => {
  'use strict';
  const F = window.fettle;
  const NUMBERS = {
    seed: [0, 2 ** 31 - 1, true, 'Seed'],
    temperature: [0, 5, false, 'Temperature'],
    top_p: [0.01, 1, false, 'Top p'],
    new_tokens: [1, 4096, true, 'New tokens'],
  };

  /* state: the page's; chosen(): variants; image(): whether they look at images; moved(): called when another item is shown */
  F.tryInput = ({ root, server, state: S, chosen, image, task, moved }) => {
    const $ = s => root.querySelector(s);
    const refuse = text => (text ? F.note($('[data-refusal]'), 'bad', text) : F.replace($('[data-refusal]')));
    const readNumbers = () => {
      for (const input of root.querySelectorAll('[data-n]')) {
        const [low, high, whole, name] = NUMBERS[input.dataset.n],
          text = input.value.trim().replace(',', '.'),
          x = Number(text);
        const ok = text !== '' && isFinite(x) && x >= low && x <= high && (!whole || Number.isInteger(x));
        input.setAttribute('aria-invalid', !ok);
        if (!ok) {
          refuse(
            `${name} ${input.value || 'is empty'}: not a ${whole ? 'whole ' : ''}number from ${low} to ${high.toLocaleString('en-US')}. Choose one inside that range.`,
          );
          return false;
        }
        S.settings[input.dataset.n] = x;
      }
      refuse('');
      return true;
    };
    const showItem = () => {
      const f = S.found,
        count = f && f.count.toLocaleString('en-US'),
        img = $('[data-image]'),
        src = S.image ? S.image.address : f && f.image;
      if (image()) {
        img.hidden = !src;
        if (src) {
          img.src = src;
          img.alt = S.image ? 'Uploaded image' : `Evaluation item ${f.index}`;
        }
        const words = f
          ? `Item ${f.index + 1} of ${count} held-out items of ${S.data}; its label is ${f.label}.`
          : 'Choose an item of the evaluation data, or upload an image.';
        F.text($('[data-image-text]'), S.image ? S.image.name : words);
      }
      if (image() || !S.data) return F.replace($('[data-items]'));
      F.replace(
        $('[data-items]'),
        F.el('button', { type: 'button', class: 'ft-chip', onclick: () => step(1) }, `Next held-out item of ${S.data}`),
        S.item !== null && f ? F.el('span', { class: 'sm mut' }, `item ${f.index + 1} of ${count}, label ${f.label}`) : null,
      );
    };
    const load = async () => {
      S.found = null;
      if (S.item !== null && S.data) {
        try {
          S.found = await F.call(server, 'item', { data: S.data, index: S.item, task: task() });
          if (typeof S.found.text === 'string') $('[data-prompt]').value = S.prompt = S.found.text;
        } catch (e) {
          refuse(e.text);
        }
      }
      showItem();
    };
    const step = async by => {
      const n = S.found ? S.found.count : 1e9;
      S.image = null;
      S.item = S.item === null ? 0 : (S.item + by + n) % n;
      await load();
      moved();
    };
    const readFile = file => {
      const reader = new FileReader();
      reader.onload = () => {
        S.image = { address: reader.result, name: file.name };
        S.item = null;
        refuse('');
        showItem();
      };
      reader.readAsDataURL(file);
    };

    const problem = () => {
      if (!chosen().length) return 'No variant is chosen. Add one below.';
      if (image())
        return S.image || S.item !== null ? '' : 'No image is chosen. Take an item of the evaluation data or upload one.';
      return S.prompt.trim() ? '' : `The ${S.mode === 'generate' ? 'prompt' : 'text'} is empty. Write at least one word.`;
    };
    const payload = () => {
      if (S.mode === 'generate') return { prompt: S.prompt, settings: { ...S.settings } };
      if (image() && S.image) return { image: S.image.address };
      return image() || (S.found && S.found.text === S.prompt) ? { data: S.data, item: S.item } : { text: S.prompt };
    };
    const setPrompt = text => {
      $('[data-prompt]').value = S.prompt = text;
    };
    return { refuse, readNumbers, showItem, load, step, readFile, problem, payload, setPrompt };
  };
})();
