// The explorer, for a page (page.js) and for a notebook (`render`, which anywidget calls). All it needs is `ask`: a request
// as plain data, and a promise of the answer. What is shown is one line of text, the link; a click makes another one.

const SCORES = {
  ram: ["RAM: the question on the evidence", "RAM"],
  gaze: ["gaze: the answering token on the evidence", "gaze"],
  vision_mass: ["vision mass: the question on the whole picture", "vision mass"],
  writes: ["writes: logits it adds to the answer", "writes"],
  effect: ["effect: the lead lost without it", "effect"],
};
const LATER = ["writes", "effect"]; // scores that cost passes of their own
const WAYS = {
  mean: "its mean over other samples", zero: "zero", resample: "its output at a random position in other samples",
  patch: "its output on the second picture", pull: "attention pulled to evidence",
};
const SINKS = {
  state: "Tokens whose state peaks in one dimension at 20 times its root mean square or more",
  attention: "Tokens that take more than 0.3 of the question's attention, as a mean over the heads of this layer",
};
const HEAT = ["#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf"];
const FAINTEST = 0.02, LIKELY = 0.0005, MOST_BYTES = 12e6, LEAST = 2; // pixels of a box
const MANY = 512; // heads; with more, what costs more than a forward is measured only on request
const SVG = "http://www.w3.org/2000/svg";

const make = (name, facts = {}, ...inner) => {
  const { data = {}, on = {}, vars = {}, ...rest } = facts;
  const element = Object.assign(document.createElement(name), rest);
  Object.assign(element.dataset, data);
  Object.entries(on).forEach(([event, act]) => element.addEventListener(event, act));
  Object.entries(vars).forEach(([key, value]) => element.style.setProperty("--" + key, value));
  element.append(...inner);
  return element;
};
const draw = (name, facts = {}, ...inner) => {
  const element = document.createElementNS(SVG, name);
  Object.entries(facts).forEach(([key, value]) => element.setAttribute(key, value));
  element.append(...inner);
  return element;
};
const percent = p => p >= 0.9995 ? "100%" : p < 0.0005 ? "0%" : (100 * p).toFixed(1) + "%";
const number = value => value == null ? "–" : Math.abs(value) < 0.0005 ? "0" : value.toFixed(3);
const sum = values => values.reduce((all, one) => all + one, 0);
const shown = text => text.trim() || JSON.stringify(text);
const plural = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const heads = text => text ? text.split(",") : [];
const middle = (low, value, high) => Math.max(low, Math.min(value, high));

export function explore(root, ask, { link = "", moved = () => {}, whole = () => link } = {}) {
  let state = Object.fromEntries(new URLSearchParams(link));
  let about = null, view = null, looks = null, changed = null, random = null, paths = null, asPaths = false, waiting = 0;
  const later = {}, failed = {}, pixels = new Map(), turns = {};
  const at = name => state[name] ?? { sinks: "shown", sample: "0", way: "mean", other: "counterfactual", score: "ram", against: "effect" }[name] ?? "";
  const written = (given = state) => new URLSearchParams(given).toString().replace(/%2C/g, ",").replace(/%3A/g, ":").replace(/%3B/g, ";");

  // -- what stands where --------------------------------------------------------------------------------------------
  const part = Object.fromEntries(["trouble", "samples", "words", "reading", "answering", "boxes", "answer", "change", "map",
    "scatter", "readout", "head", "code"].map(name => [name, make("div", { className: name })]));
  const title = make("span", { className: "model" });
  const question = make("input", { type: "text", className: "question", maxLength: 2000, ariaLabel: "Question", autocomplete: "off" });
  const copyLink = make("button", { type: "button", textContent: "Copy link", className: "copy-link" });
  const copyCode = make("button", { type: "button", textContent: "Copy as Python", className: "copy-code" });
  const code = make("pre", { tabIndex: 0 });
  const folded = make("details", { className: "python" }, make("summary", { textContent: "Python for what is shown" }), code);
  const choose = (name, label) => make("select", { className: name, ariaLabel: label, on: { change: event => go({ [name]: event.target.value }) } },
    ...Object.entries(SCORES).map(([value, [text]]) => make("option", { value, textContent: text })));
  const score = choose("score", "Score of the map"), against = choose("against", "Score to compare with");
  part.trouble.setAttribute("role", "alert");
  part.trouble.hidden = true;
  part.code.append(folded);
  root.classList.add("mech-explorer");
  root.replaceChildren(
    make("header", {}, make("b", { textContent: "mech explore" }), title, copyLink, copyCode),
    part.trouble, part.samples,
    make("div", { className: "columns" },
      make("section", { className: "seen" },
        make("form", { className: "ask", on: { submit: event => { event.preventDefault(); asked(); } } }, question,
          make("button", { type: "submit", textContent: "Ask" })),
        part.words,
        make("div", { className: "views" }, part.reading, part.answering), part.boxes),
      make("section", { className: "said" }, part.answer, part.change),
      make("section", { className: "found" }, make("h2", { textContent: "Heads" }), score, part.map, part.readout, part.head),
      make("section", { className: "beside" }, make("h2", { textContent: "Does attention imply effect?" }), against, part.scatter)),
    part.code);

  // -- asking ---------------------------------------------------------------------------------------------------------
  const inWords = error => ["given", "expected", "do"].map((name, i) => error[name] && ["", "Expected: ", "Try: "][i] + error[name]).filter(Boolean).join(". ");
  const complain = text => { part.trouble.hidden = !text; part.trouble.textContent = text; };
  const want = async (kind, request, take, fail = complain) => {
    const turn = turns[kind] = (turns[kind] || 0) + 1;
    const slow = setTimeout(() => root.classList.add("busy"), 250);
    waiting += 1;
    const answer = await ask({ state: written(), ...request });
    clearTimeout(slow);
    waiting -= 1;
    if (!waiting) root.classList.remove("busy");
    if (turns[kind] !== turn) return null; // something newer was asked
    if (answer.error) fail(inWords(answer.error));
    else take(answer);
    return !answer.error;
  };
  const sameSubject = (one, other) => ["sample", "picture", "question", "boxes"].every(name => (one[name] || "") === (other[name] || ""));
  const refresh = async before => {
    complain("");
    const subject = before && sameSubject(before, state);
    if (!subject) {
      const read = await want("show", { action: "show", known: [...pixels.keys()] }, answer => {
        answer.pictures.forEach(one => one.uri && pixels.set(one.name, one.uri));
        view = answer;
        if (question.value !== answer.question) question.value = answer.question;
      });
      if (read === false) return undo(before);
      if (!read) return;
    }
    if (!subject || before.other !== state.other) LATER.forEach(name => { delete later[name]; delete failed[name]; });
    const moves = name => !subject || (before[name] || "") !== (state[name] || ""), other = ["off", "way", "other"].some(moves);
    if (other) changed = random = null;
    render();
    const todo = [];
    if (state.off && other) {
      todo.push(want("change", { action: "change" }, answer => { changed = answer; drawAnswer(); })
        .then(read => read && want("random", { action: "random", tokens: changed.tokens.map(([id]) => id) }, answer => { random = answer; drawAnswer(); })));
    } else if (!state.off) ["change", "random"].forEach(kind => { turns[kind] = (turns[kind] || 0) + 1; }); // what is on its way is late
    if (state.head && (moves("head") || !looks)) todo.push(want("head", { action: "head" }, answer => { looks = answer; drawLooks(); drawHead(); }));
    if (state.head && asPaths && (moves("head") || moves("other"))) todo.push(readPaths());
    for (const name of LATER)
      if ([at("score"), at("against")].includes(name) && !later[name] && about.layers.length * about.heads <= MANY) todo.push(measure(name));
    todo.push(want("code", { action: "code" }, answer => { code.textContent = answer.code; }));
    await Promise.all(todo);
    root.dataset.settled = written();
  };
  // What cannot be shown is said, and left: the state before it, or the first sample where the link itself was bad.
  const undo = async before => {
    const said = part.trouble.textContent, start = !before && Object.keys(state).length > 0;
    if (!before && !start) return;
    state = before ?? {};
    moved(written());
    if (start) await refresh(null);
    else root.dataset.settled = written();
    complain(said);
  };
  const drawScores = () => { drawMap(); drawScatter(); drawHead(); drawChange(); };
  const measure = name => want(name, { action: "score", name }, answer => { later[name] = answer.score; drawScores(); },
    text => { failed[name] = text; drawScores(); });
  const readPaths = () => { paths = null; return want("paths", { action: "paths" }, answer => { paths = answer.paths; drawHead(); }); };
  const go = changes => {
    const before = state;
    state = { ...state, ...changes };
    Object.keys(state).forEach(key => (state[key] === "" || state[key] == null) && delete state[key]);
    if (before.head !== state.head || !sameSubject(before, state)) { looks = null; paths = null; }
    if (written() !== written(before)) moved(written());
    return refresh(before);
  };
  const asked = () => {
    if (!question.value.trim()) return complain("The question is empty. Expected: words to ask about the picture. Try: type some, or click a sample for its question");
    const own = question.value.trim(), stock = !state.picture && about.samples[+at("sample")].question;
    go({ question: own === stock ? "" : own, word: "" });
  };
  const toggle = name => {
    const off = heads(state.off);
    go({ off: (off.includes(name) ? off.filter(one => one !== name) : [...off, name]).join(",") });
  };

  // -- drawing --------------------------------------------------------------------------------------------------------
  const render = () => { drawSamples(); drawWords(); drawLooks(); drawBoxes(); drawAnswer(); drawChange(); drawMap(); drawScatter(); drawHead(); };

  const drawSamples = () => {
    const file = make("input", { type: "file", accept: "image/png,image/jpeg,image/webp", className: "file", ariaLabel: "Your own picture",
      on: { change: event => event.target.files[0] && add(event.target.files[0]) } });
    const own = make("label", { className: "own" + (state.picture ? " chosen" : "") }, file,
      view.file || "Drop a picture here, or choose one");
    part.samples.replaceChildren(own, ...about.samples.map((sample, i) => make("button", {
      type: "button", title: sample.question, ariaLabel: `Sample ${i}: ${sample.question}`, data: { sample: i },
      className: !state.picture && +at("sample") === i ? "chosen" : "",
      on: { click: () => go({ sample: i ? String(i) : "", picture: "", question: "", boxes: "", word: "",
        other: state.other === "blank" || !sample.counterfactual ? "" : state.other }) },
    }, sample.thumb ? make("img", { src: sample.thumb, alt: "" }) : sample.question.slice(0, 40))));
    part.samples.querySelector("button.chosen, .own.chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  };

  const drawWords = () => {
    const chip = (text, word, hint) => make("button", { type: "button", textContent: text, title: hint, data: { word },
      className: "word" + ((state.word ?? "") === word ? " chosen" : ""),
      on: { click: () => go({ word }), mouseenter: () => drawLooks(word), focus: () => drawLooks(word),
        mouseleave: () => drawLooks(), blur: () => drawLooks() } });
    part.words.replaceChildren(...view.words.map((word, i) => chip(word.replace(/ \d+$/, ""), String(i), "Where the head attends from this word")),
      chip("whole question", "", "Mean over its tokens"));
  };

  const stages = (values, most, sinks, hidden) => view.pictures.map((picture, k) => {
    const svg = draw("svg", { viewBox: `0 0 ${picture.width} ${picture.height}`, preserveAspectRatio: "none" });
    if (values) view.tokens.rect.forEach(([x0, y0, x1, y1], i) => {
      const v = values[i] / most;
      const place = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 }, isSink = sinks.has(i);
      if (view.tokens.picture[i] !== k || x0 == null || (v < FAINTEST && !(hidden && isSink))) return;
      const title = draw("title", {}, number(values[i]) + (isSink ? ", a sink" : ""));
      svg.append(hidden && isSink ? draw("rect", { ...place, class: "sink" }, title) : draw("rect", { ...place, class: "heat",
        "fill-opacity": (0.15 + 0.5 * v).toFixed(3), fill: HEAT[Math.min(HEAT.length - 1, Math.floor(v * HEAT.length))] }, title));
    });
    view.evidence.filter(box => box[0] === k).forEach(([, x0, y0, x1, y1]) => ["edge", "evidence"].forEach(name =>
      svg.append(draw("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: name }))));
    return make("div", { className: "stage" + (values ? " dim" : ""), data: { picture: k }, vars: { ratio: picture.width / picture.height } },
      make("img", { src: pixels.get(picture.name) ?? "", alt: `Picture ${k}`, draggable: false }), svg);
  });
  const drawLooks = (word = state.word ?? "") => {
    const reading = looks && (word === "" ? looks.question : looks.words[+word]), last = looks?.last;
    const sinks = sinksOf(state.head), hidden = at("sinks") === "hidden", left = values => values.filter((_, i) => !hidden || !sinks.has(i));
    const most = looks ? Math.max(...left(reading), ...left(last), 1e-9) : 1;
    const here = view.tokens.rect.map(([x0, y0, x1, y1], i) => x0 != null && view.evidence.some(([k, a, b, c, d]) =>
      k === view.tokens.picture[i] && Math.min(x1, c) > Math.max(x0, a) && Math.min(y1, d) > Math.max(y0, b)));
    const told = values => `${number(sum(values))} of its attention is on the picture`
      + (view.evidence.length ? `, ${number(sum(values.filter((_, i) => here[i])))} on the evidence` : "")
      + (sinks.size ? `, ${number(sum(values.filter((_, i) => sinks.has(i))))} on sinks` : "");
    const from = word === "" ? "the question" : `“${view.words[+word]}”`;
    const one = (place, heading, values) => place.replaceChildren(make("h3", { textContent: heading }),
      make("div", { className: "strip" + (view.pictures.length > 1 ? " many" : "") }, ...stages(values, most, sinks, hidden)),
      make("p", { className: "soft", textContent: values ? told(values) : "" }));
    one(part.reading, state.head ? `${state.head} from ${from}` : "The picture", reading);
    part.answering.hidden = !state.head;
    if (state.head) one(part.answering, `${state.head} as it answers`, last);
  };

  const sinksOf = name => new Set(name ? view.sinks[about.layers.indexOf(+name.slice(1).split("H")[0])] : []);
  const drawBoxes = () => {
    const n = sinksOf(state.head).size, hide = make("input", { type: "checkbox", className: "hide-sinks", checked: at("sinks") === "hidden",
      on: { change: event => go({ sinks: event.target.checked ? "hidden" : "" }) } });
    const sinks = n ? make("label", { className: "soft", title: SINKS[view.sinks_by] }, hide, ` hide ${plural(n, "sink")} of this layer`) : "";
    const clear = make("button", { type: "button", textContent: "Clear the box", className: "clear", hidden: !view.drawn, on: { click: () => go({ boxes: "" }) } });
    part.boxes.replaceChildren(make("p", { className: "soft", textContent: view.drawn ? "The evidence is the box you drew; hold Shift to add another."
      : view.evidence.length ? "Outlined: the evidence. Drag a box to mark other evidence." : "Drag a box over the evidence: scores measure attention inside it." }), clear, sinks);
  };

  const bar = (p, low, high) => make("td", { vars: { p, low: low ?? p, high: high ?? p }, className: "bar" + (low == null ? "" : " range"),
    title: low == null ? "" : `${percent(low)} to ${percent(high)}` }, make("span", { textContent: percent(p) }));
  const drawAnswer = () => {
    const off = heads(state.off), rows = new Map();
    const row = (id, text) => rows.get(id) ?? rows.set(id, { text, others: (random?.sets ?? []).map(one => one.p[id]).filter(p => p != null) }).get(id);
    view.top.forEach(([id, text, p]) => { row(id, text).before = p; });
    changed?.tokens.forEach(([id, text, before, now]) => Object.assign(row(id, text), { before, now }));
    const likely = [...rows.values()].filter((one, i) => i < 2 || Math.max(one.before, one.now ?? 0, ...one.others) >= LIKELY);
    const right = view.right ? ` (right: ${view.right})` : "";
    const now = off.length ? changed ? changed.answer : "…" : null;
    const flips = changed && changed.answer !== view.answer;
    const lead = make("p", { className: "lead" + (flips ? " flips" : "") }, make("b", { className: "before", textContent: shown(view.answer) }),
      ...(now == null ? [make("span", { className: "soft", textContent: right })]
        : [" → ", make("b", { className: "now", textContent: shown(now) }), make("span", { className: "soft", textContent: right })]));
    const kept = random?.sets.filter(one => one.same).length;
    const told = off.length ? make("p", { className: "soft twin", textContent: random?.sets.length
      ? `${kept} of ${random.sets.length} random sets of ${plural(off.length, "other head")}, changed the same way, leave the first token unchanged.`
      : random ? "Too few other heads to compare with." : "The same number of random heads …" }) : "";
    const table = make("table", { className: "tokens" }, make("thead", {}, make("tr", {}, ...["next token", "unchanged", ...(off.length ? ["changed", "random heads"] : [])]
      .map(text => make("th", { textContent: text })))), make("tbody", {}, ...likely.map(({ text, before, now, others }) =>
      make("tr", {}, make("th", { textContent: shown(text) }), bar(before), ...(off.length ? [now == null ? make("td", { textContent: "…" }) : bar(now),
        others.length ? bar(sum(others) / others.length, Math.min(...others), Math.max(...others)) : make("td", { textContent: random ? "–" : "…" })] : [])))));
    part.answer.replaceChildren(make("h2", { textContent: "Answer" }), lead, told, table);
  };

  const drawChange = () => {
    const off = heads(state.off), two = at("way") === "patch" || [at("score"), at("against")].includes("effect") || asPaths;
    const chips = off.map(name => make("button", { type: "button", className: "chip", textContent: `${name} ×`, title: `Switch ${name} on again`,
      ariaLabel: `Switch ${name} on again`, on: { click: () => toggle(name) } }));
    const way = make("select", { className: "way", ariaLabel: "What heads output instead", on: { change: event => go({ way: event.target.value === "mean" ? "" : event.target.value }) } },
      ...Object.entries(WAYS).map(([value, text]) => make("option", { value, textContent: text, selected: at("way") === value })));
    const pictures = [...(view.counterfactual ? [["counterfactual", "its counterfactual"]] : []), ["blank", "without the evidence"],
      ...about.samples.map((sample, i) => [String(i), `sample ${i}`]).filter(([i]) => state.picture || i !== at("sample"))];
    const known = pictures.some(([value]) => value === at("other"));
    const other = make("select", { className: "other", ariaLabel: "Second picture", on: { change: event => go({ other: event.target.value }) } },
      ...(known ? [] : [make("option", { value: at("other"), textContent: "choose", selected: true })]),
      ...pictures.map(([value, textContent]) => make("option", { value, textContent, selected: at("other") === value })));
    const n = Math.max(1, Math.round(0.05 * about.layers.length * about.heads)), values = scores(at("score"));
    const top = make("button", { type: "button", className: "top", textContent: `Top ${n} by ${SCORES[at("score")][1]}`, disabled: !values,
      on: { click: () => go({ off: ranked(scores(at("score"))).slice(0, n).map(([name]) => name).join(",") }) } });
    const on = make("button", { type: "button", className: "all-on", textContent: "All on", disabled: !off.length, on: { click: () => go({ off: "" }) } });
    part.change.replaceChildren(make("h2", { textContent: "Switched off" }),
      make("p", { className: "chips" }, ...(chips.length ? chips : [make("span", { className: "soft", textContent: "No head. Click one on the map and switch it off, or " })]), top, on),
      make("label", {}, "Instead:", way), ...(two ? [make("label", {}, "Second picture:", other)] : []));
  };

  const scores = name => LATER.includes(name) ? later[name] : view.scores[name];
  const ranked = values => about.layers.flatMap((layer, l) => values[l].map((value, h) => [`L${layer}H${h}`, value]))
    .filter(([, value]) => value != null).sort((a, b) => b[1] - a[1]);
  const missing = name => {
    if (!LATER.includes(name)) return make("p", { className: "soft none", textContent: "Draw a box over the evidence to see this score." });
    if (failed[name]) return make("p", { className: "soft none", textContent: failed[name] });
    if (about.layers.length * about.heads <= MANY) return make("p", { className: "soft none", textContent: "…" });
    return make("p", { className: "none" }, make("button", { type: "button", className: "measure", textContent: `Measure “${SCORES[name][1]}”`, on: { click: () => measure(name) } }));
  };
  const tell = name => {
    const [layer, head] = name.slice(1).split("H").map(Number), l = about.layers.indexOf(layer);
    return Object.entries(SCORES).flatMap(([key, [, label]]) => {
      const value = scores(key)?.[l]?.[head];
      return value == null ? [] : [`${label} ${number(value)}${key === "ram" && view.even ? ` (${(value / view.even).toFixed(1)} × even)` : ""}`];
    }).join(" · ");
  };
  const pointed = name => {
    const even = at("score") === "ram" && view.even != null ? `Even attention would give ${number(view.even)}. ` : "";
    part.readout.textContent = name ? `${name}: ${tell(name)}` : `${even}Click a head or use the arrow keys; Shift-click switches it off.`;
  };
  const drawMap = () => {
    score.value = at("score");
    const values = scores(at("score")), off = heads(state.off);
    const most = values ? Math.max(1e-9, ...values.flat().map(value => Math.abs(value ?? 0))) : 1;
    const cells = about.layers.flatMap((layer, l) => [make("span", { className: "axis", textContent: `L${layer}` }),
      ...Array.from({ length: about.heads }, (_, h) => {
        const name = `L${layer}H${h}`, value = values?.[l]?.[h] ?? 0, chosen = state.head === name;
        return make("button", { type: "button", data: { head: name }, ariaLabel: `${name} ${number(value)}`, ariaPressed: String(chosen),
          tabIndex: chosen || (!state.head && !l && !h) ? 0 : -1, vars: { v: Math.abs(value) / most },
          className: ["cell", value < 0 && "less", chosen && "chosen", off.includes(name) && "off"].filter(Boolean).join(" ") });
      })]);
    part.map.classList.toggle("many", about.heads > 16);
    part.map.style.setProperty("--heads", about.heads);
    const had = part.map.contains(document.activeElement);
    part.map.replaceChildren(make("span", {}), ...Array.from({ length: about.heads }, (_, h) => make("span", { className: "axis", textContent: about.heads > 16 && h % 4 ? "" : `H${h}` })), ...cells,
      ...(values ? [] : [missing(at("score"))]));
    if (had) part.map.querySelector("[tabindex='0']")?.focus();
    pointed();
  };

  const drawScatter = () => {
    against.value = at("against");
    const xs = scores(at("score")), ys = scores(at("against"));
    if (!xs || !ys) return part.scatter.replaceChildren(missing(xs ? at("against") : at("score")));
    const points = about.layers.flatMap((layer, l) => xs[l].map((x, h) => [`L${layer}H${h}`, x ?? 0, ys[l][h] ?? 0]));
    const range = i => { const all = points.map(point => point[i]), low = Math.min(0, ...all), high = Math.max(1e-9, ...all); return [low, high]; };
    const [x0, x1] = range(1), [y0, y1] = range(2), W = 360, H = 190, L = 46, B = 34;
    const X = x => L + (x - x0) / (x1 - x0) * (W - L - 12), Y = y => H - B - (y - y0) / (y1 - y0) * (H - B - 12);
    const label = (x, y, text, facts = {}) => draw("text", { x, y, ...facts }, text);
    const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${SCORES[at("against")][1]} over ${SCORES[at("score")][1]}` },
      draw("path", { d: `M${X(0)} ${Y(y0)}V${Y(y1)}M${X(x0)} ${Y(0)}H${X(x1)}`, class: "zero" }),
      ...(at("score") === "ram" && view.even ? [draw("path", { d: `M${X(view.even)} ${Y(y0)}V${Y(y1)}`, class: "even" }, draw("title", {}, `even attention: ${number(view.even)}`))] : []),
      label(L, H - B + 14, number(x0)), label(W - 12, H - B + 14, number(x1), { "text-anchor": "end" }),
      label(L - 5, Y(y0), number(y0), { "text-anchor": "end" }), label(L - 5, Y(y1) + 9, number(y1), { "text-anchor": "end" }),
      label((L + W) / 2, H - 4, SCORES[at("score")][1], { "text-anchor": "middle" }),
      label(0, 0, SCORES[at("against")][1], { "text-anchor": "middle", transform: `translate(11 ${H / 2 - 10}) rotate(-90)` }));
    const off = heads(state.off);
    points.sort((a, b) => (a[0] === state.head) - (b[0] === state.head)).forEach(([name, x, y]) => svg.append(draw("circle", { cx: X(x), cy: Y(y), r: name === state.head ? 6 : 4.5,
      "data-head": name, class: ["point", name === state.head && "chosen", off.includes(name) && "off"].filter(Boolean).join(" ") }, draw("title", {}, name))));
    part.scatter.replaceChildren(svg);
  };

  const siblings = name => {
    const [layer, head] = name.slice(1).split("H").map(Number), group = about.heads / about.kv[about.layers.indexOf(layer)];
    if (group <= 1) return "";
    const first = head - head % group, others = Array.from({ length: group }, (_, i) => first + i).filter(one => one !== head);
    return make("p", { className: "soft" }, "It shares keys and values with ", ...others.flatMap((one, i) => [i ? ", " : "",
      make("button", { type: "button", className: "link", textContent: `L${layer}H${one}`, on: { click: () => go({ head: `L${layer}H${one}` }) } })]), ".");
  };
  const drawHead = () => {
    const name = state.head;
    if (!name) return part.head.replaceChildren();
    const values = scores(at("score")), order = values ? ranked(values).map(([one]) => one) : [], off = heads(state.off).includes(name);
    const rank = order.indexOf(name) + 1;
    const list = paths && make("ol", { className: "paths" }, ...paths.map(({ from, into, effect }) => make("li", {},
      from === "embed" ? "token embeddings" : /^L\d+H\d+$/.test(from) ? make("button", { type: "button", className: "link", textContent: from, on: { click: () => go({ head: from }) } }) : from,
      ` → its ${{ q: "queries", k: "keys", v: "values" }[into]}: ${number(effect)} of the gap`)));
    part.head.replaceChildren(make("h3", {}, name, make("small", { textContent: rank ? ` rank ${rank} of ${order.length} by ${SCORES[at("score")][1]}` : "" })),
      make("p", { textContent: tell(name) }), siblings(name),
      make("p", { className: "chips" }, make("button", { type: "button", className: "switch", textContent: off ? `Switch ${name} on` : `Switch ${name} off`, on: { click: () => toggle(name) } }),
        make("button", { type: "button", className: "into", ariaExpanded: String(asPaths), textContent: asPaths ? "Hide paths into it" : "Paths into it",
          on: { click: () => { asPaths = !asPaths; drawChange(); drawHead(); if (asPaths) readPaths(); } } })),
      ...(asPaths ? [make("p", { className: "soft", textContent: "What writes to the head's inputs, by edge attribution (an estimate): share of the gap between the answers to the two pictures." }),
        list || make("p", { className: "soft", textContent: "…" })] : []));
  };

  // -- the mouse, the keyboard, files -----------------------------------------------------------------------------------
  const headOf = event => event.target.closest?.("[data-head]")?.dataset.head;
  for (const place of [part.map, part.scatter]) {
    place.addEventListener("click", event => { const name = headOf(event); if (name) event.shiftKey ? toggle(name) : go({ head: name }); });
    place.addEventListener("mouseover", event => headOf(event) && pointed(headOf(event)));
    place.addEventListener("mouseleave", () => view && pointed());
  }
  part.map.addEventListener("keydown", event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !headOf(event)) return;
    event.preventDefault();
    const [layer, head] = headOf(event).slice(1).split("H").map(Number), l = about.layers.indexOf(layer);
    go({ head: `L${about.layers[middle(0, l + step[0], about.layers.length - 1)]}H${middle(0, head + step[1], about.heads - 1)}` });
  });
  let drag = null;
  const place = (event, stage) => {
    const box = stage.getBoundingClientRect(), { width, height } = view.pictures[+stage.dataset.picture];
    return [middle(0, (event.clientX - box.left) / box.width, 1) * width, middle(0, (event.clientY - box.top) / box.height, 1) * height];
  };
  const corners = ([a, b], [c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)].map(Math.round);
  part.reading.addEventListener("pointerdown", event => {
    const stage = event.target.closest(".stage");
    if (!stage || event.button) return;
    event.preventDefault();
    drag = { stage, from: place(event, stage), rect: draw("rect", { class: "drawing" }) };
    stage.querySelector("svg").append(drag.rect);
    stage.setPointerCapture(event.pointerId);
  });
  part.reading.addEventListener("pointermove", event => {
    if (!drag) return;
    const [x, y, right, bottom] = corners(drag.from, place(event, drag.stage));
    Object.entries({ x, y, width: right - x, height: bottom - y }).forEach(([key, value]) => drag.rect.setAttribute(key, value));
  });
  part.reading.addEventListener("pointerup", event => {
    if (!drag) return;
    const { stage, from, rect } = drag, [x0, y0, x1, y1] = corners(from, place(event, stage)), k = +stage.dataset.picture;
    drag = null;
    rect.remove();
    if (x1 - x0 < LEAST || y1 - y0 < LEAST) return;
    const box = `${view.frame ? `f${k * view.frame}` : k}:${x0},${y0},${x1},${y1}`;
    go({ boxes: event.shiftKey && state.boxes ? `${state.boxes};${box}` : box });
  });
  part.reading.addEventListener("pointercancel", () => { drag?.rect.remove(); drag = null; });

  const add = async file => {
    if (file.size > MOST_BYTES) return complain(`${file.name} of ${(file.size / 1e6).toFixed(1)} MB. Expected: at most 12 MB. Try: shrink the picture`);
    const data = await new Promise(done => { const reader = new FileReader(); reader.onload = () => done(reader.result.split(",")[1] ?? ""); reader.readAsDataURL(file); });
    await want("add", { action: "add", name: file.name, data }, answer =>
      go({ picture: answer.picture, question: question.value.trim(), boxes: "", word: "", other: "blank" }));
  };
  root.addEventListener("dragover", event => { event.preventDefault(); root.classList.add("over"); });
  root.addEventListener("dragleave", () => root.classList.remove("over"));
  root.addEventListener("drop", event => {
    event.preventDefault();
    root.classList.remove("over");
    if (event.dataTransfer.files[0]) add(event.dataTransfer.files[0]);
  });

  const copy = async (button, text) => {
    const label = button.dataset.label ??= button.textContent;
    let done = false;
    try { await navigator.clipboard.writeText(text); done = true; } catch { // not allowed here: select it, where it stands
      const area = make("textarea", { value: text, readOnly: true, className: "copied" });
      root.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Not allowed here";
    setTimeout(() => { button.textContent = label; }, 1500);
  };
  copyLink.addEventListener("click", () => copy(copyLink, whole(written())));
  copyCode.addEventListener("click", () => copy(copyCode, code.textContent));

  want("open", { action: "open" }, answer => {
    about = answer;
    title.textContent = answer.name;
    title.title = answer.model;
    refresh(null);
  });
  return { go: text => { const before = state; state = Object.fromEntries(new URLSearchParams(text)); looks = paths = null; return about && refresh(before); } };
}

// What anywidget calls: requests travel as numbered messages over the kernel's channel.
export default {
  render({ model, el }) {
    const waiting = new Map();
    let number = 0;
    const arrived = ({ number, answer }) => { waiting.get(number)?.(answer); waiting.delete(number); };
    model.on("msg:custom", arrived);
    const ask = request => new Promise(done => { waiting.set(++number, done); model.send({ number, request }); });
    const place = document.createElement("div");
    el.append(place);
    explore(place, ask, {
      link: model.get("link"),
      moved: link => { model.set("link", link); model.save_changes(); },
      whole: link => link,
    });
    return () => model.off("msg:custom", arrived);
  },
};
