// The list of problems, its filters and keys, and the page of one problem. All text enters the page as text nodes.
"use strict";
(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const PAGE = 100;  // rows of the list at a time
  const FLAGS = [...document.querySelectorAll("#filters [name=flag]")].map((box) => box.nextElementSibling.textContent);
  const place = document.getElementById("problem");
  const search = document.getElementById("search"), stepChoice = document.getElementById("step");

  // ---- elements

  const el = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== "" && child !== false));
    return element;
  };
  const badges = (flags) => flags.map((flag) => el("span", { class: `badge ${flag}` }, flag));
  const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3);
  const VERDICTS = { correct: "✓ right", wrong: "✗ wrong", unparsed: "∅ no answer", timeout: "⧖ timed out", error: "! not verified" };
  const verdict = (trace) => el("span", { class: `verdict ${trace.verdict}` }, VERDICTS[trace.verdict] || trace.verdict);
  const answer = (trace) => trace.answer === null ? el("i", {}, "none") : el("code", { class: "answer" }, trace.answer);
  const tokens = (trace) => `${trace.length} tokens${trace.stop === "length" ? ", cut off" : ""}`;
  const advantage = (value, most) => {
    const bar = el("span", { class: value < 0 ? "bar minus" : "bar plus" });
    bar.style.width = `${most > 0 ? 50 * Math.abs(value) / most : 0}%`;
    return el("span", { class: "advantage" }, el("span", { class: "track" }, bar), el("span", { class: "number" }, signed(value)));
  };

  // ---- entries: every problem of the list; those with their traces in this file have a script element, read when needed

  const inside = new Map();
  for (const element of document.querySelectorAll("script[data-problem]")) inside.set(element.dataset.problem, element);
  const problems = new Map();
  const problemOf = (key) => {
    if (!problems.has(key)) problems.set(key, JSON.parse(inside.get(key).textContent));
    return problems.get(key);
  };
  const entries = [];
  for (const page of JSON.parse(document.getElementById("index").textContent)) page.cursor.forEach((cursor, i) => entries.push({
    key: `${page.step}.${cursor}`, step: page.step, id: page.id[i], right: page.right[i], of: page.of[i],
    flags: page.flags[i], href: page.href,
  }));
  const steps = [...new Set(entries.map((entry) => entry.step))];
  for (const step of steps) stepChoice.append(el("option", { value: step }, String(step)));
  stepChoice.parentElement.hidden = steps.length < 2;

  const haystack = (problem) => {
    if (!problem.haystack) {
      const traces = [...problem.search, ...problem.sets.flatMap((set) => set.traces)];
      problem.haystack = [problem.text, problem.reference, ...traces.map((trace) => trace.text)].join("\n").toLowerCase();
    }
    return problem.haystack;
  };

  // ---- the list

  let found = entries, current = -1, first = 0;

  const filter = () => {
    const wanted = [...document.querySelectorAll("#filters [name=flag]:checked")].reduce((bits, box) => bits | 1 << box.value, 0);
    const step = stepChoice.value, words = search.value.trim().toLowerCase();
    const matches = (entry) => (entry.flags & wanted) === wanted && (!step || entry.step === Number(step))
      && (!words || entry.id.toLowerCase().includes(words) || (inside.has(entry.key) && haystack(problemOf(entry.key)).includes(words)));
    const shown = current < 0 ? null : found[current];
    found = entries.filter(matches);
    current = found.indexOf(shown);
    first = current < 0 ? 0 : current - current % PAGE;
    const withTraces = found.filter((entry) => inside.has(entry.key)).length;
    document.getElementById("matches").textContent = `${found.length.toLocaleString("en")} of ${entries.length.toLocaleString("en")} problems`
      + (withTraces < found.length ? `, ${withTraces.toLocaleString("en")} of them with their traces in this file` : "");
    showList();
    if (current < 0) open(found.findIndex((entry) => inside.has(entry.key)), false);
  };

  const row = (entry, i) => el("li", {},
    el("a", { href: `#${entry.key}`, "data-i": i, "aria-current": i === current ? "true" : null },
      el("span", { class: "id" }, entry.id), el("span", { class: "where" }, `step ${entry.step}`),
      el("span", { class: "share" }, `${entry.right}/${entry.of}`),
      inside.has(entry.key) ? null : el("span", { class: "away", title: "its traces are in a page file" }, "↗"),
      el("span", { class: "badges" }, badges(FLAGS.filter((_, bit) => entry.flags & 1 << bit)))));

  const showList = () => {
    const last = Math.min(first + PAGE, found.length);
    list.replaceChildren(...found.slice(first, last).map((entry, i) => row(entry, first + i)));
    document.getElementById("range").textContent = found.length ? `${first + 1}–${last} of ${found.length.toLocaleString("en")}` : "none";
    document.getElementById("before").disabled = first === 0;
    document.getElementById("after").disabled = last >= found.length;
  };

  const turn = (by) => { first += by * PAGE; showList(); };
  document.getElementById("before").addEventListener("click", () => turn(-1));
  document.getElementById("after").addEventListener("click", () => turn(1));

  const open = (i, scroll = true) => {
    current = i >= 0 && i < found.length ? i : -1;
    if (current < 0) {
      place.replaceChildren(el("p", {}, found.length ? "Choose a problem of the list." : "No problem matches."));
      return;
    }
    const entry = found[current];
    if (current < first || current >= first + PAGE) { first = current - current % PAGE; showList(); }
    for (const link of list.querySelectorAll("a")) {
      if (Number(link.dataset.i) === current) {
        link.setAttribute("aria-current", "true");
        const box = list.getBoundingClientRect(), at = link.getBoundingClientRect();
        if (at.top < box.top || at.bottom > box.bottom) list.scrollTop += at.top - box.top - box.height / 2;
      } else link.removeAttribute("aria-current");
    }
    place.replaceChildren(...(inside.has(entry.key) ? problemPage(problemOf(entry.key)) : elsewhere(entry)));
    if (!scroll) return;
    history.replaceState(null, "", `#${entry.key}`);
    place.scrollIntoView({ block: "nearest" });
    if (place.getBoundingClientRect().top < 0) place.scrollIntoView();
  };

  // ---- one problem

  const elsewhere = (entry) => [
    el("h3", {}, entry.id), el("p", {}, `Step ${entry.step}; ${entry.right} of ${entry.of} right. Its traces are in the page file of its step:`),
    el("p", {}, el("a", { class: "button", href: `${entry.href}#${entry.key}` }, `Open ${entry.href}`)),
  ];

  const problemPage = (problem) => {
    const all = [...problem.search, ...problem.sets.flatMap((set) => set.traces)];
    const most = Math.max(...all.map((trace) => Math.abs(trace.advantage)));
    return [
      el("header", {},
        el("h3", {}, problem.id, " ", badges(problem.flags)),
        el("p", { class: "where" }, `Step ${problem.step}, position ${problem.cursor} in the data`
          + (problem.kept ? "" : "; discarded by dynamic sampling, not trained on")),
        el("pre", { class: "text" }, problem.text),
        el("p", {}, "Reference answer: ", el("code", { class: "answer" }, problem.reference))),
      stages(problem, most),
    ].flat(2);
  };

  // search, then each round: the traces that it reads in a table with its sets, and under it all that they wrote
  const stages = (problem, most) => {
    const { replay } = problem, shown = [];
    const rounds = new Set(problem.sets.length ? problem.sets.map((set) => set.round) : [1]);
    let what = replay ? `Aggregations of round ${replay.round}, sampled in step ${replay.step}` : "Search traces";
    let read = problem.search.map((trace) => ({ trace, name: `trace ${trace.name}`, id: `trace-${trace.trace}` }));
    for (const [i, round] of [...rounds].entries()) {
      const sets = problem.sets.flatMap((set, k) => set.round === round ? [{ set, k }] : []);
      shown.push(el("h4", {}, sets.length ? `${what}, and the sets that read them` : what), grid(read, sets, most));
      if (i === 0) shown.push(el("div", { class: "traces" }, read.map(({ trace, name, id }) => traceBox(name, id, trace, most))));
      shown.push(...sets.map(({ set, k }) => setBox(set, k, most)));
      what = `Aggregations of round ${round}`;
      read = sets.flatMap(({ set, k }) => set.traces.map((trace) => ({ trace, name: trace.name, id: aggregationId(k, trace) })));
    }
    return shown;
  };
  const aggregationId = (k, trace) => `aggregation-${k}-${trace.trace}`;

  const reveal = (id) => {
    const target = document.getElementById(id);
    if (target.tagName === "DETAILS") target.open = true;
    target.scrollIntoView({ block: "center" });
    (target.querySelector("summary") || target).focus();
  };

  const grid = (read, sets, most) => {
    const cell = (n, set) => {
      if (!set.members.includes(n)) return el("td", { class: "out" }, "·");
      const at = set.order.indexOf(n);
      return el("td", { class: "in" }, el("span", { title: at < 0 ? "in the set, left out of its prompt" : `attempt ${at + 1} in its prompt` }, at < 0 ? "○" : String(at + 1)));
    };
    const heads = sets.map(({ set, k }) => el("th", { scope: "col" },
      el("button", { type: "button", onclick: () => reveal(`set-${k}`) }, set.name, el("small", {}, ` ${set.right}/${set.verified}`))));
    const rows = read.map(({ trace, name, id }, n) => el("tr", {},
      el("th", { scope: "row" }, el("button", { type: "button", onclick: () => reveal(id) }, name)),
      el("td", {}, answer(trace)), el("td", {}, verdict(trace)),
      el("td", { class: trace.stop === "length" ? "number cut" : "number" }, String(trace.length), trace.stop === "length" ? el("small", {}, " cut off") : null),
      el("td", {}, advantage(trace.advantage, most)), sets.map(({ set }) => cell(n, set))));
    return el("div", { class: "scroll", tabindex: "0" }, el("table", { class: "grid" },
      el("thead", {}, el("tr", {}, ["", "answer", "verdict", "tokens", "advantage"].map((head) => el("th", { scope: "col" }, head)), heads)),
      el("tbody", {}, rows)),
      sets.length ? el("p", { class: "note" }, "Sets are columns: right / verified aggregations; a number is the place of the trace in the set's prompt.") : null);
  };

  const traceBox = (name, id, trace, most) => el("details", { id, class: "trace" },
    el("summary", {}, el("b", {}, name), " ", answer(trace), " ", verdict(trace), " ", el("span", { class: "where" }, tokens(trace)), " ", advantage(trace.advantage, most),
      trace.quotes ? el("span", { class: "quotes" }, quoted(trace)) : null),
    el("p", { class: "why" }, el("b", {}, `Advantage ${signed(trace.advantage)}. `), trace.why),
    trace.detail ? el("p", { class: "why" }, el("b", {}, "Verifier: "), trace.detail) : null,
    trace.quotes ? el("p", { class: "why" }, el("b", {}, "Quotes: "), trace.quotes.length ? trace.quotes.map(quoteWords).join("; ") + "." : "no candidate by this page's definition.") : null,
    el("pre", { class: "text" }, trace.text));

  const quoted = (trace) => trace.quotes.length ? `quotes ${trace.quotes.map((quote) => quote.name).join(", ")}` : "quotes none";
  const quoteWords = (quote) => {
    const parts = [];
    if (quote.same_answer) parts.push("same answer");
    if (quote.copied > 0) parts.push(`${Math.max(1, Math.round(100 * quote.copied))} % of its runs of words`);
    return `trace ${quote.name} (${parts.join(", ")})`;
  };

  const setBox = (set, k, most) => el("section", { class: "set", id: `set-${k}`, tabindex: "-1" },
    el("h4", {}, `Set ${set.name}: ${set.right} of ${set.verified} aggregations right `, badges(set.flags)),
    el("p", { class: "where" }, `Its prompt lists ${set.order.length ? `traces ${set.listed.join(", ")}` : "no trace"}, in this order; a vote among its candidates is right with chance ${set.vote.toFixed(2)}.`),
    set.traces.map((trace) => traceBox(`aggregation ${trace.trace}`, aggregationId(k, trace), trace, most)));

  // ---- what a person does

  const byHash = () => {
    const key = decodeURIComponent(location.hash.slice(1));
    if (!/^\d+\.\d+$/.test(key)) return false;
    let i = found.findIndex((entry) => entry.key === key);
    if (i < 0) {  // hidden by a filter: a link wins
      document.getElementById("filters").reset();
      current = -1;
      filter();
      i = found.findIndex((entry) => entry.key === key);
    }
    if (i >= 0) open(i);
    return i >= 0;
  };
  addEventListener("hashchange", byHash);
  list.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    open(Number(link.dataset.i));
    place.focus({ preventScroll: true });
  });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
  document.getElementById("filters").addEventListener("change", (event) => { if (event.target !== search) filter(); });
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "j") open(Math.min(current + 1, found.length - 1));
    else if (event.key === "k") open(Math.max(current - 1, 0));
    else if (event.key === "/") { event.preventDefault(); search.focus(); search.scrollIntoView({ block: "nearest" }); }
  });

  filter();
  byHash();
  performance.mark("listed");  // benchmarks/report_size.py reads it
})();
