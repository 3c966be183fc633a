"use strict";
// The workshop: a request goes out, a session comes back event by event. All text is put in as text, never as HTML.
const $ = (id) => document.getElementById(id);
const el = (tag, cls = "", ...inside) => {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  node.append(...inside.filter((x) => x !== null && x !== undefined && x !== ""));
  return node;
};
const SAID = { cut: "it was cut off, for no room was left", malformed: "it has not the shape that was asked for", empty: "it is empty", unclosed_think: "it never came out of its thoughts", complete: "" };
const DOING = { brief: "The educator writes the brief", draft: "The poet writes draft", critique: "The educator reads draft", revision_brief: "The educator writes the brief for draft", note: "The educator writes a last note" };
let drafts = [], running = null;

// ------------------------------------------------------------------ asking
async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key"), headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) { await askKey(); return ask(path, options); }
  const said = await response.json().catch(() => ({}));
  const again = response.headers.get("retry-after");
  throw new Error(response.status === 503 ? `The server is busy; try again in ${again || "some"} seconds.` : said.error || `The server answered ${response.status}.`);
}
function askKey() {
  const door = $("door");
  return new Promise((done) => {
    door.onclose = () => { sessionStorage.setItem("key", $("key").value); $("key").value = ""; done(); };
    if (!door.open) door.showModal();
  });
}
async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    held += value || "";
    const rows = held.split("\n");
    held = rows.pop();
    for (const row of rows) if (row) yield JSON.parse(row);
    if (done) return;
  }
}

// ------------------------------------------------------------------ what changed
const words = (line) => line.match(/\s+|[^\s]+/g) || [];
function common(a, b, same) { // longest common subsequence: pairs of indices
  const n = a.length, m = b.length, table = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) table[i][j] = same(a[i], b[j]) ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const pairs = [];
  for (let i = 0, j = 0; i < n && j < m;) {
    if (same(a[i], b[j])) pairs.push([i++, j++]);
    else if (table[i + 1][j] >= table[i][j + 1]) i++;
    else j++;
  }
  return pairs;
}
const bare = (text) => text.toLowerCase().replace(/[^\p{L}\p{N}' ]/gu, "").trim();
function newWords(before, now) { // ranges of `now` that `before` has not
  const a = words(before), b = words(now), kept = new Set(common(a, b, (x, y) => bare(x) === bare(y)).map(([, j]) => j)), ranges = [];
  let at = 0;
  b.forEach((w, j) => { if (!kept.has(j) && w.trim()) ranges.push([at, at + w.length]); at += w.length; });
  return ranges;
}
function compare(before, now) { // rows: {text, number, fresh: ranges} in order, with {gone} between them
  if (!before) return now.map((text) => ({ text, fresh: [] }));
  const rows = [], pairs = [...common(before, now, (x, y) => bare(x) === bare(y)), [before.length, now.length]];
  let i = 0, j = 0;
  for (const [a, b] of pairs) {
    const old = before.slice(i, a).filter((l) => l.trim()), fresh = now.slice(j, b);
    for (const text of fresh) {
      if (!text.trim()) { rows.push({ text, fresh: [] }); continue; }
      const from = old.shift(), ranges = from === undefined ? [[0, text.length]] : newWords(from, text);
      const wholly = ranges.reduce((n, [x, y]) => n + y - x, 0) > .7 * text.length;
      if (wholly && from !== undefined) rows.push({ gone: from });
      rows.push({ text, fresh: wholly ? [[0, text.length]] : ranges });
    }
    for (const text of old) rows.push({ gone: text });
    if (b < now.length) rows.push({ text: now[b], fresh: [] });
    i = a + 1; j = b + 1;
  }
  const gone = rows.filter((r) => r.gone !== undefined).length, lost = gone > 3 && gone > before.filter((l) => l.trim()).length / 2;
  return lost ? now.map((text) => ({ text, fresh: [], lost: gone })) : rows; // another poem: nothing to compare
}

// ------------------------------------------------------------------ a poem
function paint(text, marks, fresh, quoted) { // a line with stress marks, new words, quoted words
  const inside = (ranges, i) => ranges.some(([a, b]) => i >= a && i < b), out = document.createDocumentFragment();
  let group = null, kind = "";
  for (let i = 0; i < text.length; i++) {
    const now = `${inside(fresh, i) ? "n" : ""}${inside(quoted, i) ? "q" : ""}`;
    if (now !== kind || !group) {
      kind = now;
      group = el(now.includes("n") ? "ins" : "span", now.includes("q") ? "quoted" : "");
      out.append(group);
    }
    const mark = (marks || "")[i];
    if (mark && mark.trim()) {
      const letter = el("span", mark === "ˊ" ? "mark strong" : "mark", text[i]);
      letter.dataset.mark = mark;
      group.append(letter);
    } else group.append(text[i]);
  }
  return out;
}
function quotes(text, issues) { // where the words that the critique quotes stand in a line
  const ranges = [];
  for (const issue of issues) for (const quote of (issue.quote.match(/"[^"]+"/g) || []).map((q) => q.slice(1, -1))) {
    const at = text.toLowerCase().indexOf(quote.toLowerCase());
    if (at >= 0) ranges.push([at, at + quote.length]);
  }
  return ranges;
}
function issueNote(issue, list) {
  const note = el("p", "issue", el("b", "", issue.type), issue.lines.length ? ` · ${issue.place}` : ` · ${issue.place || "the whole"}`, ` — ${issue.direction}`);
  const light = (on) => issue.lines.forEach((n) => list.querySelector(`[data-n="${n}"]`)?.classList.toggle("lit", on));
  note.tabIndex = 0;
  for (const event of ["mouseenter", "focus"]) note.addEventListener(event, () => light(true));
  for (const event of ["mouseleave", "blur"]) note.addEventListener(event, () => light(false));
  return note;
}
function poemList(draft, before) {
  const list = el("ol", "poem"), issues = draft.critique?.issues || [], verse = [...(draft.verse?.lines || [])];
  const counts = {}, colors = {};
  for (const line of verse) counts[line.rhyme] = (counts[line.rhyme] || 0) + 1;
  for (const line of verse) if (counts[line.rhyme] > 1 && !(line.rhyme in colors)) colors[line.rhyme] = Object.keys(colors).length % 8;
  let number = 0, gap = false, gone = 0, last = null;
  const ends = () => last?.style.setProperty("--span", String(Math.max(1, number - Number(last.style.getPropertyValue("--row"))))); // as far as the next one
  for (const row of compare(before?.content.split("\n"), draft.content.split("\n"))) {
    if (row.gone !== undefined) { list.append(el("li", "line gone", el("span", "text", row.gone))); gone++; continue; }
    if (!row.text.trim()) { gap = number > 0; continue; }
    number++;
    const at = verse.findIndex((l) => l.text.trim() === row.text.trim()), seen = at >= 0 ? verse.splice(0, at + 1).at(-1) : null;
    const named = issues.filter((i) => i.lines.includes(number)), notes = issues.filter((i) => i.lines[0] === number);
    const shift = seen ? Math.max(0, row.text.indexOf(seen.text)) : 0, marks = seen ? " ".repeat(shift) + seen.marks : "";
    const letter = el("span", `letter${seen && seen.rhyme in colors ? ` c${colors[seen.rhyme]}` : ""}`, seen ? seen.rhyme : "");
    const item = el("li", `line${gap ? " stanza" : ""}${named.length ? " named" : ""}`, el("span", "number", number % 5 ? "" : String(number)), letter,
      el("span", "text", paint(row.text, marks, row.fresh, quotes(row.text, named))));
    item.dataset.n = number;
    if (seen?.departures.length) item.title = seen.departures.join("; ");
    if (notes.length) {
      ends();
      last = el("div", "notes", ...notes.map((i) => issueNote(i, list)));
      last.style.setProperty("--row", String(number));
      last.style.setProperty("--row-changes", String(number + gone));
      item.append(last);
      list.classList.add("noted");
    }
    list.append(item);
    gap = false;
  }
  number++;
  ends();
  draft.anew = before && compare(before.content.split("\n"), draft.content.split("\n")).some((r) => r.lost);
  return list;
}

// ------------------------------------------------------------------ a draft
function verdict(j) {
  if (!j) return null;
  const sure = j.unsure ? "unsure" : j.label;
  const head = el("summary", `chip ${j.unsure ? "" : j.label}`, `judge: ${sure}${j.doubt ? `, ${j.doubt}` : `, P(good) ${j.p_good.toFixed(2)}`}`);
  const why = [...j.reasons.map((r) => `${r.weight > 0 ? "for" : "against"}: ${r.says}${r.lines.length ? ` (${[...new Set(r.lines.map(([n]) => n))].slice(0, 4).map((n) => `line ${n}`).join(", ")})` : ""}`)];
  return el("details", "", head, el("ul", "", ...why.map((w) => el("li", "", w))));
}
function facts(v) {
  if (!v) return "";
  const best = v.asked || v.forms[0], name = v.asked ? `${best.form}: ${best.accepted ? "kept" : "not kept"}` : best.accepted ? best.form : `no known form; nearest ${best.form}`;
  return el("details", "facts", el("summary", "", `${name} (${best.score.toFixed(2)}) · ${v.meter.name} · rhymes ${v.rhyme.scheme.replace(/\n+/g, " ") || "none"}`),
    el("ul", "", ...[...v.warnings, ...best.deviations.slice(0, 8)].map((d) => el("li", "", d))));
}
function critique(draft) {
  if (draft.critique === undefined) return "";
  const c = draft.critique, box = el("section", `critique${c.done ? " done" : ""}`, el("h2", "", "critique"));
  if (!c.works) box.append(el("p", "odd", `The critique cannot be read in parts: ${SAID[draft.critiqueEnded] || SAID.malformed}. As it came:`), el("p", "raw", draft.critiqueText || "(nothing)"));
  else box.append(el("p", "works", el("b", "", "What works "), c.works), ...c.issues.filter((i) => !i.lines.length).map((i) => issueNote(i, box)));
  return box;
}
function render(draft) {
  const n = drafts.indexOf(draft), before = drafts[n - 1]?.content ? drafts[n - 1] : null;
  const head = el("div", "head", el("h2", "", `draft ${n + 1}`), draft.critique?.done ? el("span", "chip good", "approved") : "");
  draft.node.replaceChildren(head);
  if (draft.content === undefined) draft.node.append(el("p", "coming", draft.coming || "…"));
  else if (!draft.content.trim()) draft.node.append(el("p", "odd", `No poem came: ${SAID[draft.ended] || "it is empty"}.`));
  else draft.node.append(verdict(draft.judgement) || "", draft.title ? el("h3", "", draft.title) : "", poemList(draft, before), facts(draft.verse));
  if (draft.anew) draft.node.append(el("p", "odd", "Another poem: most lines of the draft before are gone."));
  if (draft.ended && draft.ended !== "complete" && draft.content) draft.node.append(el("p", "odd", `This draft: ${SAID[draft.ended] || draft.ended}.`));
  draft.node.append(critique(draft));
}
function draftAt(n) {
  while (drafts.length <= n) {
    const node = el("article", "draft");
    node.tabIndex = 0;
    node.setAttribute("aria-label", `Draft ${drafts.length + 1}`);
    drafts.push({ node, coming: "" });
    $("drafts").append(node);
    node.scrollIntoView({ behavior: "smooth", block: "nearest", inline: "nearest" });
  }
  return drafts[n];
}
async function scan(draft, form) {
  if (!draft.content?.trim()) return;
  try { draft.verse = await (await ask("api/verse", { method: "POST", body: JSON.stringify({ text: draft.content, form }) })).json(); render(draft); } catch { /* the poem stands without it */ }
}
function showBrief(text, parts, ended) {
  const box = $("brief");
  box.hidden = false;
  box.replaceChildren(el("h2", "", "brief"));
  if (parts) box.append(el("dl", "", ...[["Angle", parts.angle], ["Avoid", parts.avoid.join("; ")], ["Images", parts.images], ["Form", parts.form]].flatMap(([k, v]) => [el("dt", "", k), el("dd", "", v)])));
  else {
    if (ended) box.append(el("p", "odd", `The educator's brief cannot be used: ${SAID[ended] || ended}. Where none can, the poet gets the request itself. As it came:`));
    box.append(el("p", "raw", text || "…"));
  }
}

// ------------------------------------------------------------------ a session
function status(text, kind = "") { $("status").className = kind; $("status").textContent = text; }
function hear(event, form) {
  if (event.event === "error") throw new Error(event.error);
  const { step, draft: n } = event, number = step === "revision_brief" ? n + 2 : n + 1;
  if (event.event === "piece") {
    status(`${DOING[step]}${["brief", "note"].includes(step) ? "" : ` ${number}`} …`, "busy");
    if (step === "draft") { const d = draftAt(n); if (d.content !== undefined) { delete d.content; d.coming = ""; } d.coming += event.text; d.node.querySelector(".coming") ? d.node.querySelector(".coming").textContent = d.coming : render(d); }
    if (step === "brief") { showBrief((hear.brief += event.text), null, ""); }
  }
  if (event.event !== "step") return;
  if (step === "brief") { hear.brief = ""; showBrief(event.text, event.brief, event.ended); }
  if (step === "draft") {
    const d = draftAt(n);
    Object.assign(d, { title: event.title || "", content: event.content ?? "", judgement: event.judgement, ended: event.ended, coming: "" });
    render(d);
    scan(d, form);
  }
  if (step === "critique") {
    const d = draftAt(n);
    Object.assign(d, { critique: event.critique, critiqueText: event.text, critiqueEnded: event.ended });
    render(d);
  }
  if (step === "note") { $("note").hidden = false; $("note").replaceChildren(el("h2", "", "the educator's note"), el("p", "said", event.text || "(none)"), event.ended === "complete" ? "" : el("p", "odd", `The note: ${SAID[event.ended] || event.ended}.`)); }
}
function ended(session) {
  const m = session.metadata, poems = `${m.drafts} draft${m.drafts === 1 ? "" : "s"}`;
  status(m.stopped ? `It ended early: ${m.stopped}.` : m.approved ? `Done: ${poems}, the last one approved.` : `Done: ${poems}, ${m.drafts === 1 ? "not" : "none"} approved.`);
}
async function write(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  const form = $("form").value, body = { request: $("request").value, form, revisions: Number($("revisions").value), seed: Number($("seed").value) || 0 };
  drafts = []; hear.brief = "";
  $("drafts").replaceChildren(); $("brief").hidden = $("note").hidden = true;
  $("tools").hidden = $("stop").hidden = false; $("write").disabled = true;
  status("Waiting for a turn at the model …", "busy");
  try {
    let last = null;
    for await (const e of lines(await ask("api/workshop", { method: "POST", body: JSON.stringify(body), signal: running.signal }))) { hear(e, form); if (e.event === "end") last = e.session; }
    if (!last) throw new Error("The connection ended before the session did.");
    ended(last);
  } catch (e) {
    status(e.name === "AbortError" ? "Stopped." : e.message, e.name === "AbortError" ? "" : "fault");
    for (const d of drafts) if (d.content === undefined) { Object.assign(d, { content: d.coming, ended: "cut", title: "" }); render(d); }
  }
  running = null;
  $("stop").hidden = true; $("write").disabled = false;
}

// ------------------------------------------------------------------ the page
async function begin() {
  for (const name of ["rhymes", "stresses", "changes", "critique"]) {
    const box = $(`show-${name}`), show = () => document.body.classList.toggle(`show-${name}`, box.checked);
    box.addEventListener("change", show);
    show();
  }
  $("ask").addEventListener("submit", write);
  $("stop").addEventListener("click", () => running?.abort());
  $("request").addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) $("ask").requestSubmit(); });
  document.addEventListener("keydown", (e) => { if (e.key === "Escape" && running && !$("door").open) running.abort(); });
  $("drafts").addEventListener("keydown", (e) => {
    const at = drafts.findIndex((d) => d.node === document.activeElement), to = at + { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (at >= 0 && drafts[to]) { drafts[to].node.focus(); e.preventDefault(); }
  });
  $("copy").addEventListener("click", async () => {
    const d = drafts.filter((x) => x.content?.trim()).at(-1);
    if (!d) return;
    await navigator.clipboard.writeText(`${d.title ? `${d.title}\n\n` : ""}${d.content}\n`).then(() => status("Copied."), () => status("The browser does not let the page copy.", "fault"));
  });
  try {
    const about = await (await ask("api/workshop")).json();
    for (const f of about.forms) { const option = el("option", "", f.name); option.value = f.name; option.dataset.about = f.about; $("form").append(option); }
    $("form").addEventListener("change", () => { $("form-about").textContent = $("form").selectedOptions[0].dataset.about || ""; });
    $("demonstration").hidden = !about.demonstration;
    $("crew").textContent = `Educator and poet: ${about.origin}. Rhymes, stresses and forms by the verse tools; the judge learned from verse of 1780 to 1930.`;
  } catch (e) { status(e.message, "fault"); }
}
begin();
