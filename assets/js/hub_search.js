/* Below a field for a hub id: what the hub has under the words typed. An exact id needs no list and works without it. */
fettle.parts = fettle.parts || {};
fettle.parts.hubSearch = function (form, input, kind, choose) {
  'use strict';
  const { h } = fettle.form,
    fill = fettle.replace;
  const list = h('div', { class: 'nr-hub', role: 'listbox', 'aria-label': 'Found on the hub', hidden: true }),
    said = h('p', { class: 'mi dim', role: 'status' });
  let asked = '';
  const look = fettle.debounce(async () => {
    const words = input.value.trim();
    if (words === asked) return;
    asked = words;
    if (words.length < 2) {
      list.hidden = true;
      said.textContent = '';
      return;
    }
    const got = await form.server.hub({ kind, text: words });
    if (words !== asked || !input.isConnected) return;
    if (got.error) {
      list.hidden = true;
      said.textContent = got.error.text;
      return;
    }
    said.textContent = got.rows.length ? '' : 'The hub has nothing under these words.';
    list.hidden = !got.rows.length;
    fill(
      list,
      ...got.rows.map(r =>
        h(
          'button',
          {
            type: 'button',
            role: 'option',
            class: 'nr-hubrow',
            onclick: () => {
              input.value = asked = r.id;
              list.hidden = true;
              choose(r.id);
            },
          },
          h('b', null, r.id),
          h('span', { class: 'dim' }, [r.task, r.gated ? 'asks for consent' : ''].filter(Boolean).join(', ')),
          h('span', { class: 'num mut' }, `${fettle.count(r.downloads)} downloads`),
        ),
      ),
    );
  }, 300);
  input.addEventListener('input', look);
  input.addEventListener('keydown', e => {
    if (e.key === 'ArrowDown' && !list.hidden) {
      e.preventDefault();
      list.firstChild.focus();
    } else if (e.key === 'Escape') list.hidden = true;
  });
  list.addEventListener('keydown', e => {
    const to = { ArrowDown: 'nextSibling', ArrowUp: 'previousSibling' }[e.key];
    if (to) {
      e.preventDefault();
      (document.activeElement[to] || (to === 'previousSibling' ? input : document.activeElement)).focus();
    } else if (e.key === 'Escape') {
      list.hidden = true;
      input.focus();
    }
  });
  return h('div', { class: 'nr-hubbox' }, list, said);
};

/* A button that sends a file from the browser; the server keeps it and answers with its path. */
fettle.parts.upload = function (form, choose, failed) {
  'use strict';
  const { h, button } = fettle.form;
  const file = h('input', { type: 'file', hidden: true, accept: '.csv,.tsv,.jsonl,.json,.parquet,.txt', 'aria-label': 'Data file to send' });
  const send = button('Upload', null, () => file.click());
  file.addEventListener('change', async () => {
    const one = file.files[0];
    file.value = '';
    if (!one) return;
    send.disabled = true;
    send.textContent = 'Sending\u2026';
    try {
      const body = new FormData();
      body.append('files', one);
      const answer = await fetch('/gradio_api/upload', { method: 'POST', body });
      if (!answer.ok) throw new Error(`The server refused the file (${answer.status}). Give a path on its machine instead.`);
      const got = await form.server.upload({ path: (await answer.json())[0], name: one.name });
      if (got.error) throw new Error(got.error.text);
      choose(got.path);
    } catch (e) {
      failed(one.name, e.message);
    }
    send.disabled = false;
    send.textContent = 'Upload';
  });
  return h('span', null, send, file);
};
