// The first page: campaigns, their state, a countdown, what remains.
//
// Time is the server's: its clock is read with the round trip halved and carried on by
// performance.now(), so the phone's own clock, right or wrong, plays no part. One request is under
// way at a time, each has a time limit, nothing is asked while the page is hidden, and errors
// double the wait up to half a minute: an opening must not be drowned by those who watch it.
"use strict";

const TEXTS = {
  zh: {
    title: "工会会员抢票", heading: "工会会员抢票", clock: "北京时间", other: "English",
    loading: "正在读取活动…", reconnecting: "暂时连不上，正在重新连接…", retry: "立即重试",
    emptyTitle: "现在没有活动", emptyText: "有新的活动时会出现在这里，不用刷新。",
    footer: "票数和时间以服务器为准，本页自动更新，不用刷新。",
    education: "教育培训", culture: "文化休闲", sport: "体育健身", health: "健康体检", living: "生活服务",
    scheduled: "即将开抢", open: "正在抢票", soldout: "已售完", paused: "暂停售票",
    recovering: "暂停（系统检修中）", closed: "已结束",
    free: "免费", price: (yuan) => `${yuan} 元/张`, limit: (n) => `每卡限 ${n} 张`,
    unions: "限指定工会会员",
    until: "距开抢还有", byHand: "开抢时间待定", opens: (when) => `${when} 开抢`, soon: "马上开始…",
    days: "天", total: "共", left: "剩余", few: "仅剩", fewOf: "张", of: (n) => `/ ${n} 张`, tickets: "张",
    closes: (when) => `${when} 截止`,
    soldoutNote: "加票和退票会马上放出，请留意本页。",
    pausedNote: "已买到的票不受影响，恢复后本页会自动显示。",
    recoveringNote: "正在核对数据，已买到的票不受影响。",
    showings: (n) => `${n} 个场次/班级`, available: (n) => `，${n} 个有票`,
    rest: (n) => `余 ${n}`, stock: (n) => `${n} 张`, none: "已满", opened: (t) => `${t}：已经开抢`, gone: (t) => `${t}：已售完`,
    back: (t) => `${t}：又有票了`,
  },
  en: {
    title: "Union members' tickets", heading: "Union members' tickets", clock: "Beijing time",
    other: "中文",
    loading: "Reading the campaigns…", reconnecting: "No connection. Reconnecting…", retry: "Try now",
    emptyTitle: "Nothing on at the moment", emptyText: "New campaigns appear here by themselves.",
    footer: "Figures and time are the server's. This page keeps itself up to date.",
    education: "Education", culture: "Culture", sport: "Sport", health: "Health", living: "Daily life",
    scheduled: "Upcoming", open: "Open", soldout: "Sold out", paused: "Paused",
    recovering: "Paused (maintenance)", closed: "Ended",
    free: "Free", price: (yuan) => `${yuan} yuan each`, limit: (n) => `${n} per card at most`,
    unions: "Members of certain unions",
    until: "Opens in", byHand: "Opening time to be announced", opens: (when) => `Opens ${when}`,
    soon: "Any moment now…",
    days: "d", total: "", left: "Left", few: "Only", fewOf: "left", of: (n) => `of ${n}`, tickets: "tickets",
    closes: (when) => `Until ${when}`,
    soldoutNote: "Tickets that are added or given back go on sale at once: keep an eye on this page.",
    pausedNote: "Tickets already bought are safe. This page will show when it goes on.",
    recoveringNote: "The books are being checked. Tickets already bought are safe.",
    showings: (n) => `${n} dates or classes`, available: (n) => `, ${n} with places`,
    rest: (n) => `${n} left`, stock: (n) => n, none: "Full", opened: (t) => `${t}: now open`,
    gone: (t) => `${t}: sold out`, back: (t) => `${t}: tickets are back`,
  },
};

const REQUEST_LIMIT_MS = 8000;
const BACKOFF_MAX_MS = 30000;
const TIME_EVERY_MS = 60000;
const CAMPAIGNS_EVERY_MS = 15000;
const PAGES_MAX = 5;
const TIME_SAMPLES = 3;
const FEW = 0.1; // of the stock
const FOLD_ABOVE = 3; // showings
const LANGUAGE_KEY = "sale.language";

const $ = (id) => document.getElementById(id);
const jitter = (ms) => ms * (0.75 + Math.random() / 2);

// ---- language -------------------------------------------------------------------------------

let language = "zh";
try {
  language = localStorage.getItem(LANGUAGE_KEY) === "en" ? "en" : "zh";
} catch {
  // Private windows may refuse storage: Chinese, then.
}
const words = () => TEXTS[language];
const locale = () => (language === "zh" ? "zh-CN" : "en-GB");
const figure = (n) => n.toLocaleString(locale());

function applyLanguage() {
  document.documentElement.lang = locale();
  document.title = words().title;
  for (const node of document.querySelectorAll("[data-text]")) {
    node.textContent = words()[node.dataset.text];
  }
  $("language").textContent = words().other;
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  for (const card of cards.values()) card.render();
}

function switchLanguage() {
  language = language === "zh" ? "en" : "zh";
  try {
    localStorage.setItem(LANGUAGE_KEY, language);
  } catch {
    // It holds for this visit only.
  }
  applyLanguage();
}

// ---- time -----------------------------------------------------------------------------------

let offset = null; // server's clock minus performance.now(), ms
let bestTripMs = Infinity;
const serverNow = () => performance.now() + offset;

async function readTime() {
  bestTripMs *= 1.5; // an old good sample loses its worth as clocks drift
  for (let i = 0; i < TIME_SAMPLES; i++) {
    const sent = performance.now();
    const { now } = await get("/api/v1/time");
    const trip = performance.now() - sent;
    const moment = Date.parse(now);
    if (Number.isNaN(moment)) throw new Error("no time");
    if (trip <= bestTripMs || offset === null) {
      bestTripMs = trip;
      offset = moment - (sent + trip / 2);
    }
  }
}

function clockOf(ms, parts) {
  const options = { timeZone: "Asia/Shanghai", hourCycle: "h23", ...parts };
  return new Intl.DateTimeFormat(locale(), options).format(ms);
}

// "5月1日 09:00" or "1 May 09:00"; the year where it is not this one, seconds where there are any.
function dateOf(ms) {
  const year = (moment) => clockOf(moment, { year: "numeric" });
  const day = { month: "long", day: "numeric" };
  if (offset !== null && year(ms) !== year(serverNow())) day.year = "numeric";
  const time = { hour: "2-digit", minute: "2-digit" };
  if (ms % 60000 !== 0) time.second = "2-digit";
  return `${clockOf(ms, day)} ${clockOf(ms, time)}`;
}

// ---- requests -------------------------------------------------------------------------------

async function get(path) {
  const stop = new AbortController();
  const limit = setTimeout(() => stop.abort(), REQUEST_LIMIT_MS);
  try {
    // no-cache: an answer kept by the phone is confirmed (304), never shown as news.
    const answer = await fetch(path, { cache: "no-cache", signal: stop.signal });
    if (!answer.ok) {
      const waitMs = 1000 * (Number(answer.headers.get("Retry-After")) || 0);
      throw Object.assign(new Error(path), { status: answer.status, waitMs });
    }
    return await answer.json();
  } finally {
    clearTimeout(limit);
  }
}

async function readCampaigns() {
  const items = [];
  let cursor = null;
  for (let page = 0; page < PAGES_MAX; page++) {
    const from = cursor === null ? "" : `&cursor=${encodeURIComponent(cursor)}`;
    const list = await get(`/api/v1/campaigns?limit=200${from}`);
    items.push(...list.items);
    cursor = list.next;
    if (cursor === null) break;
  }
  showCampaigns(items.filter((campaign) => campaign.state !== "draft"));
}

// ---- a campaign's card ----------------------------------------------------------------------

const cards = new Map();
const onScreen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const card = cards.get(entry.target.dataset.id);
    if (card) card.seen = entry.isIntersecting;
  }
  wake();
});

class Card {
  constructor(campaign) {
    this.element = $("campaign").content.firstElementChild.cloneNode(true);
    this.element.dataset.id = campaign.id;
    this.part = (selector) => this.element.querySelector(selector);
    this.remaining = null; // Map of showing id to {tickets, remaining}
    this.due = 0;
    this.failures = 0;
    this.seen = false;
    this.told = null;
    this.askedAtOpening = false;
    onScreen.observe(this.element);
    this.update(campaign);
  }

  update(campaign) {
    this.campaign = campaign;
    this.opensAt = campaign.opens_at === null ? null : Date.parse(campaign.opens_at);
    this.render();
  }

  async readAvailability(every) {
    this.due = performance.now() + jitter(every);
    const { id } = this.campaign;
    try {
      const answer = await get(`/api/v1/campaigns/${encodeURIComponent(id)}/availability`);
      this.remaining = new Map(answer.showings.map((showing) => [showing.id, showing]));
      this.failures = 0;
    } catch (error) {
      if (error.status === undefined) throw error;
      // The server is there and cannot tell of this one: show no figure rather than an old one.
      this.failures += 1;
      this.remaining = null;
      this.due = performance.now() + backoff(this.failures, error.waitMs);
      // The list tells whether it is this campaign alone.
      due.campaigns = Math.min(due.campaigns, performance.now() + jitter(2000));
    }
    this.render();
  }

  // Milliseconds between two looks at what remains; null where there is nothing to look at.
  everyMs() {
    if (this.campaign.state === "closed") return null;
    return this.state() === "open" ? 1500 : 5000;
  }

  totals() {
    let tickets = 0;
    let remaining = 0;
    for (const showing of this.campaign.showings) {
      const now = this.remaining?.get(showing.id);
      tickets += now ? now.tickets : showing.tickets;
      remaining += now ? now.remaining : 0;
    }
    return { tickets, remaining };
  }

  state() {
    const { state } = this.campaign;
    const gone = this.remaining !== null && this.totals().remaining === 0;
    return state === "open" && gone ? "soldout" : state;
  }

  render() {
    const { campaign } = this;
    const state = this.state();
    this.part(".category").textContent = words()[campaign.category] ?? campaign.category;
    this.part(".state").textContent = words()[state] ?? state;
    this.part("h2").textContent = campaign.title;
    const yuan = campaign.price_fen / 100;
    this.part(".price").textContent =
      campaign.price_fen === 0 ? words().free : words().price(figure(yuan));
    this.part(".limit").textContent = words().limit(figure(campaign.card_limit));
    this.part(".unions").textContent = campaign.unions.includes("*") ? "" : words().unions;
    this.renderStock(state);
    this.renderShowings(state);
    this.part(".note").textContent = this.note(state);
    this.tick();
    this.tell(state);
  }

  renderStock(state) {
    const { tickets, remaining } = this.totals();
    const known = this.remaining !== null;
    const counts = known && ["open", "paused", "recovering"].includes(state);
    const few = counts && remaining > 0 && remaining <= tickets * FEW;
    this.element.className = `campaign is-${state}${few ? " is-few" : ""}`;
    const shown = counts || (state === "scheduled" && tickets > 0);
    this.part(".stock").hidden = !shown;
    if (!shown) return;
    this.part(".word").textContent = counts ? (few ? words().few : words().left) : words().total;
    this.part(".amount strong").textContent = figure(counts ? remaining : tickets);
    const of = few ? words().fewOf : words().of(figure(tickets));
    this.part(".of").textContent = counts ? of : words().tickets;
    this.part(".bar").hidden = !counts;
    this.part(".bar span").style.width = tickets ? `${(100 * remaining) / tickets}%` : "0";
  }

  renderShowings(state) {
    const { showings } = this.campaign;
    const details = this.part(".showings");
    details.hidden = showings.length < 2 || state === "closed";
    if (details.hidden) return;
    const list = details.querySelector("ul");
    if (list.childElementCount !== showings.length) {
      const row = $("showing").content.firstElementChild;
      list.replaceChildren(...showings.map(() => row.cloneNode(true)));
      details.open = showings.length <= FOLD_ABOVE;
    }
    const before = state === "scheduled";
    let available = 0;
    showings.forEach((showing, n) => {
      const row = list.children[n];
      const now = this.remaining?.get(showing.id);
      row.querySelector(".name").textContent = showing.title;
      row.querySelector(".when").textContent =
        showing.starts_at === null ? "" : dateOf(Date.parse(showing.starts_at));
      const rest = row.querySelector(".rest");
      const none = now?.remaining === 0;
      if (before) rest.textContent = words().stock(figure(now?.tickets ?? showing.tickets));
      else if (now === undefined) rest.textContent = "";
      else rest.textContent = none ? words().none : words().rest(figure(now.remaining));
      rest.classList.toggle("none", none && !before);
      if (now?.remaining > 0) available += 1;
    });
    details.querySelector("summary").textContent =
      words().showings(figure(showings.length)) +
      (this.remaining === null || before ? "" : words().available(figure(available)));
  }

  note(state) {
    if (state === "open" && this.campaign.closes_at !== null) {
      return words().closes(dateOf(Date.parse(this.campaign.closes_at)));
    }
    return words()[`${state}Note`] ?? "";
  }

  // Once a second: the countdown, and one early look at the list when it reaches zero.
  tick() {
    const box = this.part(".countdown");
    box.hidden = this.campaign.state !== "scheduled";
    if (box.hidden) return;
    const what = box.querySelector(".what");
    const left = box.querySelector(".left");
    const when = this.opensAt === null ? "" : words().opens(dateOf(this.opensAt));
    box.querySelector(".when").textContent = when;
    if (this.opensAt === null || offset === null) {
      what.textContent = this.opensAt === null ? words().byHand : words().until;
      left.textContent = this.opensAt === null ? "" : "--:--:--";
      return;
    }
    const seconds = Math.ceil((this.opensAt - serverNow()) / 1000);
    if (seconds > 0) {
      what.textContent = words().until;
      left.replaceChildren(...countdown(seconds));
      this.askedAtOpening = false;
      return;
    }
    what.textContent = "";
    left.textContent = words().soon;
    // The first look is spread over a second: every phone of the district gets here at once.
    const patience = this.askedAtOpening ? jitter(2000) : 150 + 1000 * Math.random();
    this.askedAtOpening = true;
    due.campaigns = Math.min(due.campaigns, performance.now() + patience);
    wake();
  }

  // For those who listen rather than look: only changes that matter, never the figures.
  tell(state) {
    const before = this.told;
    this.told = state;
    if (before === null || before === state) return;
    const { title } = this.campaign;
    if (state === "soldout") $("news").textContent = words().gone(title);
    else if (state === "open" && before === "soldout") $("news").textContent = words().back(title);
    else if (state === "open") $("news").textContent = words().opened(title);
    else $("news").textContent = `${title}：${words()[state]}`;
  }
}

function countdown(seconds) {
  const two = (n) => String(n).padStart(2, "0");
  const days = Math.floor(seconds / 86400);
  const hours = Math.floor(seconds / 3600) % 24;
  const clock = `${two(hours)}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}`;
  if (days === 0) return [clock];
  const unit = document.createElement("small");
  unit.textContent = ` ${words().days} `;
  return [figure(days), unit, clock];
}

const ORDER = { open: 0, paused: 1, recovering: 1, scheduled: 2, closed: 3 };

function showCampaigns(campaigns) {
  const rank = (c) => ORDER[c.state] ?? 4;
  const opens = (c) => (c.opens_at === null ? Infinity : Date.parse(c.opens_at));
  const known = new Map(campaigns.map((campaign) => [campaign.id, campaign]));
  for (const [id, card] of cards) {
    if (known.has(id)) continue;
    onScreen.unobserve(card.element);
    card.element.remove();
    cards.delete(id);
  }
  for (const [id, campaign] of known) {
    const card = cards.get(id);
    if (card) card.update(campaign);
    else cards.set(id, new Card(campaign));
  }
  const sorted = [...known.values()].sort((a, b) => rank(a) - rank(b) || opens(a) - opens(b) || 0);
  const elements = sorted.map((campaign) => cards.get(campaign.id).element);
  const place = $("campaigns");
  // Moved only where the order changed: a reader's focus and open lists stay as they are.
  elements.forEach((element, n) => {
    if (place.children[n] !== element) place.insertBefore(element, place.children[n] ?? null);
  });
  $("loading").hidden = true;
  $("empty").hidden = elements.length > 0;
}

// ---- the loop -------------------------------------------------------------------------------

const due = { time: 0, campaigns: 0 }; // on performance.now()
let failures = 0;
let running = false;
let wake = () => {};

function sleep(ms) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

function backoff(failed, waitMs = 0) {
  return jitter(Math.min(BACKOFF_MAX_MS, Math.max(waitMs, 1000 * 2 ** (failed - 1))));
}

// What is due next: [moment, what to do]. Time first, then the list, then what is on the screen.
function next() {
  const jobs = [
    [due.time, async () => { await readTime(); due.time = performance.now() + jitter(TIME_EVERY_MS); }],
    [due.campaigns, async () => {
      due.campaigns = performance.now() + jitter(CAMPAIGNS_EVERY_MS);
      await readCampaigns();
    }],
  ];
  for (const card of cards.values()) {
    const every = card.everyMs();
    const wanted = card.seen || card.remaining === null; // each once, then those on the screen
    if (!wanted || every === null) continue;
    jobs.push([card.due, () => card.readAvailability(every)]);
  }
  return jobs.reduce((first, job) => (job[0] < first[0] ? job : first));
}

function showTrouble(trouble) {
  $("trouble").hidden = !trouble;
  document.body.classList.toggle("stale", trouble);
  if (trouble) $("loading").hidden = true;
}

async function run() {
  if (running) return;
  running = true;
  while (!document.hidden) {
    const [moment, job] = next();
    const wait = moment - performance.now();
    if (wait > 0) {
      await sleep(wait);
      continue;
    }
    try {
      await job();
      failures = 0;
      showTrouble(false);
    } catch (error) {
      failures += 1;
      due.time = due.campaigns = 0;
      showTrouble(true);
      await sleep(backoff(failures, error.waitMs));
    }
  }
  running = false;
}

function tick() {
  if (!document.hidden && offset !== null) {
    $("now").textContent = clockOf(serverNow(), {
      hour: "2-digit", minute: "2-digit", second: "2-digit",
    });
    for (const card of cards.values()) card.tick();
  }
  const intoSecond = offset === null ? 0 : serverNow() % 1000;
  setTimeout(tick, 1000 - intoSecond + 5);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) return wake();
  // A sleeping phone may have stopped performance.now(): its carried time is worth nothing.
  bestTripMs = Infinity;
  due.time = due.campaigns = 0;
  for (const card of cards.values()) card.due = 0;
  run();
});
$("language").addEventListener("click", switchLanguage);
$("language").hidden = false;
$("retry").addEventListener("click", () => wake());
$("loading").hidden = false;
applyLanguage();
tick();
run();
