"use strict";
// The gallery: rows are filtered, sorted, cut into pages and drawn. Texts of questions and answers come from models and
// users; they enter the page as text only, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const thumbnails = byId("thumbnails").textContent.split("\n");
  const files = data.files.length;

  // Columns of data.rows, data.images and of an answer, in the order in which the program writes them.
  const rows = data.rows.map((fields, order) => {
    const [id, question, images, kind, type, truth, answers] = fields;
    return { id, question, images, kind, type, truth, order, answers: answers.map(readAnswer) };
  });
  const images = data.images.map(([name, width, height, problem]) => ({ name, width, height, problem }));

  function readAnswer(fields) {
    if (fields === null) return null;
    const [text, accuracy, confidence, error, second, secondConfidence] = fields;
    return { text, accuracy, confidence, error, second, secondConfidence };
  }

  // --- what a row is --------------------------------------------------------------------------------------------

  const isRight = (answer) => answer !== null && answer.accuracy !== null && answer.accuracy >= data.rightFrom;
  const isWrong = (answer) => answer !== null && answer.error === null && answer.accuracy !== null && !isRight(answer);
  const isScored = (answer) => answer !== null && answer.accuracy !== null;

  const SHOW = {
    all: () => true,
    wrong: (row, file) => isWrong(row.answers[file]),
    right: (row, file) => isRight(row.answers[file]),
    error: (row, file) => row.answers[file] === null || row.answers[file].error !== null,
    fixed: (row, file) => isScored(row.answers[0]) && !isRight(row.answers[0]) && isRight(row.answers[file]),
    broken: (row, file) => isRight(row.answers[0]) && isScored(row.answers[file]) && !isRight(row.answers[file]),
    differ: (row, file) => (row.answers[0] && row.answers[0].text) !== (row.answers[file] && row.answers[file].text),
  };

  function searchText(row) {
    if (row.searchText === undefined) {
      const given = row.answers.filter((answer) => answer !== null).map((answer) => answer.text ?? answer.error);
      const names = row.images.map((index) => images[index].name);
      const parts = [String(row.id), row.question, ...row.truth.map(([text]) => text), ...given, ...names];
      row.searchText = parts.join("\n").toLowerCase();
    }
    return row.searchText;
  }

  // --- choosing and sorting -------------------------------------------------------------------------------------

  function matches(row, state) {
    return (state.kind === "" || row.kind === Number(state.kind))
      && (state.type === "" || row.type === Number(state.type))
      && state.q.toLowerCase().split(/\s+/).every((word) => searchText(row).includes(word));
  }

  // A missing number sorts last, whichever way the others run.
  const last = (value, direction) => (value === null || value === undefined ? Infinity : direction * value);
  const accuracyOf = (row, file) => (row.answers[file] === null ? null : row.answers[file].accuracy);
  const confidenceOf = (row, file) => (row.answers[file] === null ? null : row.answers[file].confidence);
  const SORT = {
    wrong: (row, file) => [last(accuracyOf(row, file), 1), last(confidenceOf(row, file), -1)],
    unsure: (row, file) => [last(confidenceOf(row, file), 1), 0],
    sure: (row, file) => [last(confidenceOf(row, file), -1), 0],
    order: () => [0, 0],
  };

  function sortRows(chosen, state) {
    const keyed = chosen.map((row) => ({ row, key: SORT[state.sort](row, Number(state.file)) }));
    const compare = (one, other) => (one === other ? 0 : one < other ? -1 : 1);
    keyed.sort((one, other) => compare(one.key[0], other.key[0]) || compare(one.key[1], other.key[1])
      || one.row.order - other.row.order);
    return keyed.map((entry) => entry.row);
  }

  // --- state: the form, and the address after # -----------------------------------------------------------------

  const form = byId("controls");
  form.reset(); // some browsers bring back what was chosen before a reload; the address alone decides
  const DEFAULTS = readForm();

  // With one file, or without true answers, the form lacks some fields.
  function readForm() {
    return { kind: "", type: "", file: "0", ...Object.fromEntries(new FormData(form)), page: 1 };
  }

  function writeForm(state) {
    for (const field of form.elements) {
      if (field.type === "radio") field.checked = field.value === state[field.name];
      else if (field.name) field.value = state[field.name];
    }
  }

  function readAddress() {
    const state = { ...DEFAULTS };
    for (const [key, value] of new URLSearchParams(location.hash.slice(1))) {
      if (key === "page") state.page = Math.max(1, Math.floor(Number(value)) || 1);
      else if (key === "q" || (Object.hasOwn(DEFAULTS, key) && choicesOf(key).includes(value))) state[key] = value;
    }
    return state;
  }

  function choicesOf(name) {
    const field = form.elements[name];
    if (!field) return [];
    return field.options ? [...field.options].map((option) => option.value) : [...field].map((radio) => radio.value);
  }

  function writeAddress(state) {
    const changed = Object.entries(state).filter(([key, value]) => String(value) !== String(DEFAULTS[key]));
    const address = new URLSearchParams(changed).toString();
    if (address || !isAnchor()) history.replaceState(null, "", `#${address || "gallery"}`);
  }

  function isAnchor() {
    return location.hash === "" || byId(location.hash.slice(1)) !== null;
  }

  // --- drawing --------------------------------------------------------------------------------------------------

  function make(name, className, ...children) {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function makeText(name, className, text) {
    const node = make(name, className, text);
    node.dir = "auto";
    return node;
  }

  const percent = (value) => `${(100 * value).toFixed(value > 0.995 && value < 1 ? 1 : 0)} %`;

  function drawImage(index) {
    const image = images[index];
    const encoded = thumbnails[index];
    if (encoded) {
      const node = make("img");
      node.src = `data:image/jpeg;base64,${encoded}`;
      node.alt = image.name;
      node.decoding = "async";
      return node;
    }
    const problem = (image.problem ?? "not in this page").replaceAll("_", " ");
    return make("span", "missing", makeText("b", "", problem), makeText("span", "", image.name));
  }

  function drawImages(row) {
    const button = make("button", "images");
    button.type = "button";
    button.setAttribute("aria-label", "All questions about this image");
    if (row.images.length) button.append(...row.images.map(drawImage));
    else button.append(make("span", "missing", make("span", "", "a question without image")));
    button.addEventListener("click", () => openDetail(row));
    return button;
  }

  function drawMark(answer) {
    if (answer === null || answer.error !== null) return ["!", "is-error", "no answer"];
    if (answer.accuracy === null) return ["·", "", "not scored"];
    if (answer.accuracy > 0 && answer.accuracy < 1) return ["◐", "is-partly", `accuracy ${percent(answer.accuracy)}`];
    return answer.accuracy === 1 ? ["✓", "is-right", "right"] : ["✗", "is-wrong", "wrong"];
  }

  function drawAnswer(answer, file) {
    const [sign, className, meaning] = drawMark(answer);
    const mark = make("dd", `mark ${className}`, sign);
    mark.title = meaning;
    mark.setAttribute("aria-label", meaning);
    const text = answer === null ? "no line in this file" : answer.error ?? (answer.text || "(empty answer)");
    const parts = [mark, makeText("dd", `clamp ${className}`, text)];
    if (files > 1) parts.unshift(make("dt", "", make("span", `key file${file % 6}`), makeText("span", "name", data.files[file])));
    if (answer !== null && answer.confidence !== null) {
      const fill = make("i");
      fill.style.width = `${100 * answer.confidence}%`;
      const sure = make("dd", "sure", percent(answer.confidence));
      sure.title = "probability of the answer";
      parts.push(sure, make("dd", `bar ${className}`, fill));
    }
    if (answer !== null && answer.second !== null) {
      const second = makeText("dd", "second", `runner-up “${answer.second}” ${percent(answer.secondConfidence)}`);
      second.title = "what came second: another first token, or another answer of the list";
      parts.push(second);
    }
    return make("div", "", ...parts);
  }

  function drawTruth(row) {
    const people = row.truth.reduce((sum, [, count]) => sum + count, 0);
    const words = row.truth.map(([text, count]) => (people > 1 ? `${text} (${count})` : text)).join(", ");
    return make("div", "", make("dt", "", "true"), make("dd", "mark", "→"), makeText("dd", "clamp", words));
  }

  function drawWords(row) {
    const tags = make("p", "tags", makeText("span", "", data.kinds[row.kind]),
      row.type === null ? null : makeText("span", "", data.types[row.type]), makeText("span", "", `#${row.id}`));
    const answers = make("dl", "answers", row.truth.length ? drawTruth(row) : null,
      ...row.answers.map((answer, file) => drawAnswer(answer, file)));
    return [makeText("p", "question clamp", row.question), answers, tags];
  }

  function drawTile(row) {
    return make("li", "tile", drawImages(row), make("div", "words", ...drawWords(row)));
  }

  // --- the dialog: one image, all its questions -----------------------------------------------------------------

  const dialog = byId("detail");
  const rowsOfImage = new Map();
  rows.forEach((row) => row.images.forEach((index) => {
    if (!rowsOfImage.has(index)) rowsOfImage.set(index, []);
    rowsOfImage.get(index).push(row);
  }));

  function openDetail(row) {
    const related = row.images.length ? [...new Set(row.images.flatMap((index) => rowsOfImage.get(index)))] : [row];
    const ordered = [row, ...related.filter((other) => other !== row)];
    byId("detail-title").textContent = row.images.map((index) => images[index].name).join(", ") || `question ${row.id}`;
    byId("detail-images").replaceChildren(...row.images.map((index) => {
      const { name, width, height } = images[index];
      const caption = [row.images.length > 1 ? name : "", width ? `${width} × ${height} pixels` : ""];
      return make("figure", "", drawImage(index), makeText("figcaption", "", caption.filter(Boolean).join(", ")));
    }));
    byId("detail-rows").replaceChildren(...ordered.map((other) => make("div", "", ...drawWords(other))));
    byId("detail-rows").querySelectorAll(".clamp").forEach((node) => node.classList.remove("clamp"));
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  byId("detail-close").addEventListener("click", () => dialog.close());

  // --- one round ------------------------------------------------------------------------------------------------

  let state = readAddress();

  function draw() {
    const file = Number(state.file);
    const isComparable = files > 1 && file > 0;
    if (!isComparable && ["fixed", "broken", "differ"].includes(state.show)) state.show = "all";
    const candidates = rows.filter((row) => matches(row, state));
    for (const radio of form.querySelectorAll("input[name=show]")) {
      const chosen = radio.value === "all" ? candidates : candidates.filter((row) => SHOW[radio.value](row, file));
      radio.parentElement.querySelector("b").textContent = chosen.length.toLocaleString("en");
      if (radio.dataset.pair) radio.parentElement.hidden = !isComparable;
    }
    const found = sortRows(candidates.filter((row) => SHOW[state.show](row, file)), state);
    const size = Number(state.size);
    const pages = Math.max(1, Math.ceil(found.length / size));
    state.page = Math.min(state.page, pages);
    const start = (state.page - 1) * size;
    const shown = found.slice(start, start + size);
    byId("tiles").replaceChildren(...shown.map(drawTile));
    byId("nothing").hidden = found.length > 0;
    const range = shown.length ? `${(start + 1).toLocaleString("en")} to ${(start + shown.length).toLocaleString("en")} of ` : "";
    for (const pager of document.querySelectorAll(".pager")) {
      pager.querySelector("output").textContent = `${range}${found.length.toLocaleString("en")} questions`;
      pager.querySelector("[data-step='-1']").disabled = state.page === 1;
      pager.querySelector("[data-step='1']").disabled = state.page === pages;
      const field = pager.querySelector("input");
      field.max = pages;
      field.value = state.page;
      pager.querySelector(".pages").textContent = `of ${pages.toLocaleString("en")}`;
    }
    writeForm(state);
    writeAddress(state);
  }

  function turnTo(page, fromBelow) {
    state.page = Math.max(1, Math.floor(Number(page)) || 1);
    draw();
    if (fromBelow) byId("gallery").scrollIntoView();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { state = readForm(); draw(); });
  form.addEventListener("reset", () => setTimeout(() => { state = { ...DEFAULTS }; draw(); }));
  document.querySelectorAll(".pager").forEach((pager, index) => {
    pager.addEventListener("click", (event) => {
      const button = event.target.closest("[data-step]");
      if (button) turnTo(state.page + Number(button.dataset.step), index > 0);
    });
    pager.querySelector("input").addEventListener("change", (event) => turnTo(event.target.value, index > 0));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    if (event.target.closest("input, select, textarea, [contenteditable]")) return;
    if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
    if (event.key === "ArrowRight") turnTo(state.page + 1, false);
    if (event.key === "ArrowLeft") turnTo(state.page - 1, false);
  });
  addEventListener("hashchange", () => {
    if (isAnchor()) return;
    state = readAddress();
    draw();
  });
  draw();
  document.documentElement.dataset.ready = "true";
})();
