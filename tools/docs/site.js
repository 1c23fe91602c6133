// Switch of theme, menu on narrow screens, mark in the table of contents, search
const root = document.currentScript.dataset.root, $ = s => document.querySelector(s), doc = document.documentElement

$('#theme').onclick = () => {
  const dark = doc.dataset.theme ? doc.dataset.theme == 'dark' : matchMedia('(prefers-color-scheme: dark)').matches
  doc.dataset.theme = dark ? 'light' : 'dark'
  try { localStorage.theme = doc.dataset.theme } catch (e) {}  // kept where the browser allows it
}
$('#menu').onclick = () => $('#menu').setAttribute('aria-expanded', document.body.classList.toggle('open'))

const side = $('#sidebar'), current = $('#sidebar [aria-current]')
if (current) side.scrollTop = current.offsetTop - side.clientHeight / 2

const heads = [...document.querySelectorAll('main :is(h2, h3)[id]')]
const mark = () => {
  const here = heads.filter(h => h.getBoundingClientRect().top < 120).pop()
  document.querySelectorAll('aside a').forEach(a => a.classList.toggle('here', !!here && a.hash == '#' + here.id))
}
addEventListener('scroll', mark, { passive: true })
mark()

// The index is a script that sets `searchIndex`, so that search works from files, too: [page, heading, address, text] of every section
const box = $('#search'), list = $('#results')
let loading
const load = () => loading ||= new Promise((done, fail) => {
  const s = document.createElement('script')
  s.src = root + 'site/search.js'; s.onload = done; s.onerror = fail
  document.head.append(s)
})
const count = (text, word) => text.toLowerCase().split(word).length - 1
const find = query => {
  const words = query.toLowerCase().split(/\s+/).filter(o => o)
  return searchIndex.map(sec => {
    const [page, head, , text] = sec
    const per = words.map(w => 40 * (head.toLowerCase() == w) + 12 * count(head, w) + 6 * count(page, w) + Math.min(count(text, w), 5))
    return [per.every(o => o) ? per.reduce((a, b) => a + b, 0) : 0, sec]
  }).filter(o => o[0]).sort((a, b) => b[0] - a[0]).slice(0, 12).map(o => o[1])
}
const snippet = (text, word) => {
  const i = Math.max(0, text.toLowerCase().indexOf(word) - 40)
  return (i ? '… ' : '') + text.slice(i, i + 140) + (text.length > i + 140 ? ' …' : '')
}
const show = () => {
  const query = box.value.trim()
  list.hidden = !query
  if (!query) return
  list.replaceChildren(...find(query).map(([page, head, url, text]) => {
    const li = document.createElement('li'), a = document.createElement('a'), b = document.createElement('b')
    b.textContent = head == page ? page : `${page} › ${head}`
    a.href = root + url
    a.append(b, snippet(text, query.toLowerCase().split(/\s+/)[0]))
    li.append(a)
    return li
  }))
  if (!list.children.length) list.innerHTML = '<li class="none">Nothing found</li>'
}
box.onfocus = load
box.oninput = () => load().then(show)
box.onkeydown = e => {
  const all = [...list.querySelectorAll('a')], i = all.findIndex(a => a.classList.contains('on'))
  const step = { ArrowDown: 1, ArrowUp: -1 }[e.key]
  if (step && all.length) {
    all[i]?.classList.remove('on')
    all[(i + step + all.length) % all.length].classList.add('on'); e.preventDefault()
  } else if (e.key == 'Enter' && all.length) { location.href = all[Math.max(i, 0)].href; list.hidden = true }
  else if (e.key == 'Escape') { list.hidden = true; box.blur() }
}
addEventListener('keydown', e => { if (e.key == '/' && document.activeElement != box) { e.preventDefault(); box.focus() } })
addEventListener('click', e => { if (!e.target.closest('.search')) list.hidden = true })
