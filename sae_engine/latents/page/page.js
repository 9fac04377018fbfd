"use strict";
// Whatever comes from a text is put in with textContent alone: nothing here makes HTML of a string.
const all = window.saeLatents; // written by latents.js: {shown, counts, encoded, size, lenses}
const loaded = new Map(); // a chunk's number -> its promise
const arrived = {};
window.saeChunk = (number, entries) => { arrived[number] = entries; };

function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// Files cannot be fetched from file://, but scripts can be loaded.
function chunk(number) {
  if (!loaded.has(number)) loaded.set(number, new Promise((resolve, reject) => {
    const script = make("script", undefined, {src: `data-${number}.js`});
    script.onload = () => resolve(arrived[number]);
    script.onerror = () => { loaded.delete(number); reject(new Error(`data-${number}.js is missing`)); };
    document.head.append(script);
  }));
  return loaded.get(number);
}

const number = (value) => value ? Number(value).toPrecision(3).replace("-", "−") : "0";
const share = (count) => count ? `${number(100 * count / all.encoded)} %` : "dead";

// Characters that would not be seen, or would move others about, are drawn as signs.
const SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"};
function tokenParts(token) {
  const parts = [];
  let plain = "";
  for (const c of token) {
    const code = c.codePointAt(0);
    let sign = SIGNS[c];
    if (!sign && code < 32) sign = String.fromCodePoint(0x2400 + code);
    if (!sign && (code === 127 || (code >= 128 && code < 160) || /[\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u.test(c)))
      sign = `\\u${code.toString(16).padStart(4, "0")}`;
    if (!sign) { plain += c; continue; }
    if (plain) parts.push(document.createTextNode(plain));
    plain = "";
    parts.push(make("span", sign, {class: "sign"}));
  }
  if (plain) parts.push(document.createTextNode(plain));
  return parts;
}

function tokenLabel(token) {
  const code = make("code");
  code.append(...tokenParts(token));
  return code;
}

function rows(entries, left) {
  const table = make("table");
  for (const [key, value] of entries) {
    const row = table.insertRow();
    row.insertCell().append(left(key));
    row.insertCell().textContent = number(value);
  }
  return table;
}

function latentLink(latent) {
  return make("a", latent, {href: `#${latent}`});
}

function section(title, ...content) {
  const element = make("section");
  element.append(make("h3", title), ...content);
  return element;
}

function histogram(bars) {
  const SVG = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(SVG, "svg");
  const most = Math.max(...bars.counts), n = bars.counts.length;
  const set = (element, attributes) => {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  set(picture, {viewBox: `0 0 ${n * 10} 100`, preserveAspectRatio: "none", class: "bars", role: "img",
    "aria-label": `histogram of ${bars.counts.reduce((a, b) => a + b, 0)} activations`});
  bars.counts.forEach((count, i) => {
    // Logarithmic: the rare large activations are what one looks for.
    const height = count ? 8 + 92 * Math.log1p(count) / Math.log1p(most) : 0;
    const bar = set(document.createElementNS(SVG, "rect"), {x: i * 10 + 0.5, y: 100 - height, width: 9, height});
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${count} tokens`;
    bar.append(title);
    picture.append(bar);
  });
  const axis = make("p", undefined, {class: "axis"});
  axis.append(make("span", number(bars.low)), make("span", "tokens, log scale"), make("span", number(bars.high)));
  return [picture, axis];
}

function contextView(context, largest) {
  const view = make("div", undefined, {class: "context"});
  view.append(make("span", number(context.a[context.p]), {class: "value"}));
  const text = make("div", undefined, {class: "text"});
  context.t.forEach((token, i) => {
    const value = context.a[i];
    const part = make("bdi", undefined, {title: `${value ? number(value) : "0"} · position ${context.f + i}`});
    part.append(...tokenParts(token));
    if (value) part.style.backgroundColor = `rgba(var(--fire), ${(0.12 + 0.7 * Math.abs(value) / largest).toFixed(3)})`;
    if (i === context.p) part.className = "peak";
    text.append(part);
  });
  view.append(text, make("span", `document ${context.d}, token ${context.k}`, {class: "where"}));
  return view;
}

let lens = 0; // which of the sites that are written; it stays from latent to latent
function lensOf(site) {
  return [section("Logit lens: raises", rows(site.u, tokenLabel)),
    section("Logit lens: lowers", rows(site.l, tokenLabel))];
}

function lensChoice(sites, columns) {
  const choice = make("select");
  sites.forEach((site, i) => choice.append(make("option", `${all.lenses[i]} · ${number(100 * site.s)} %`, {value: i})));
  choice.value = lens;
  choice.addEventListener("change", () => {
    lens = Number(choice.value);
    columns.lastChild.remove();
    columns.lastChild.remove();
    columns.append(...lensOf(sites[lens]));
  });
  const label = make("label", "Logit lens of ", {class: "lens"});
  label.append(choice, " of the squared decoder norm");
  return label;
}

function draw(latent, found) {
  const article = document.getElementById("latent");
  const parts = [make("h2", `Latent ${latent}`)];
  const count = all.counts[latent];
  parts.push(make("p", `fires on ${count.toLocaleString("en")} of ${all.encoded.toLocaleString("en")} tokens` +
    ` (${share(count)})` + (found && found.e !== null ? `; cosine of encoder and decoder ${number(found.e)}` : ""),
    {class: "soft"}));
  if (!count) parts.push(make("p", "Dead: it fired on no token of this text."));
  if (!found) {
    parts.push(make("p", `More of it was not written. To have it: --latents ${latent}, when the page is made.`));
  } else {
    const columns = make("div", undefined, {class: "columns"});
    if (found.h) columns.append(section("Activations", ...histogram(found.h)));
    if (found.n) columns.append(section("Nearest decoder rows", rows(found.n, latentLink)));
    if (found.w.length) columns.append(...lensOf(found.w[lens]));
    parts.push(columns);
    if (found.w.length > 1) parts.push(lensChoice(found.w, columns));
    if (found.c.length) parts.push(section("Contexts in which it fires most",
      ...found.c.map((context) => contextView(context, Math.abs(found.c[0].a[found.c[0].p])))));
  }
  article.replaceChildren(...parts);
}

async function show(latent) {
  const message = document.getElementById("message");
  message.textContent = "";
  const place = all.shown.indexOf(latent);
  try {
    const found = place < 0 ? undefined : (await chunk(Math.floor(place / all.size)))[place % all.size];
    if (location.hash && location.hash !== `#${latent}`) return; // another was asked for meanwhile
    draw(latent, found);
  } catch (error) {
    message.textContent = `${error.message}: copy the whole folder.`;
  }
  for (const link of document.querySelectorAll("#list a[aria-current]")) link.removeAttribute("aria-current");
  document.querySelector(`#list a[href="#${latent}"]`)?.setAttribute("aria-current", "true");
}

const STEP = 200;
let listed = 0;
function list() {
  const end = Math.min(listed + STEP, all.shown.length);
  for (const latent of all.shown.slice(listed, end)) {
    const link = make("a", undefined, {href: `#${latent}`});
    link.append(make("span", latent), make("small", share(all.counts[latent])));
    const item = make("li");
    item.append(link);
    document.getElementById("list").append(item);
  }
  listed = end;
  document.getElementById("more").hidden = listed === all.shown.length;
}

function ask(text) {
  const message = document.getElementById("message");
  if (!/^\d+$/.test(text) || Number(text) >= all.counts.length) {
    message.textContent = `Latents are 0 to ${all.counts.length - 1}.`;
    return;
  }
  if (location.hash === `#${Number(text)}`) show(Number(text));
  else location.hash = Number(text);
}

document.getElementById("more").addEventListener("click", list);
document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(document.getElementById("number").value.trim());
});
window.addEventListener("hashchange", () => ask(location.hash.slice(1)));
list();
if (/^#\d+$/.test(location.hash)) ask(location.hash.slice(1));
else show(all.shown[0]);
