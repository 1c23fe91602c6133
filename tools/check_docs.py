"""Fail where the pages in _docs/, or what the notebooks store, are not as they should be

    python tools/check_docs.py                 # files and links, then every page in Chromium
    python tools/check_docs.py --no-browser    # files and links only

Pages are those of `tools/make_docs.py`. In Chromium each is opened in light and dark, wide and narrow.
"""
import argparse, functools, html, http.server, json, os, re, shutil, sys, tempfile, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from nbdev.config import get_config
from notebooks import nbs, notebooks, page_of, root, shown, sidebar

docs = root/'_docs'
void = {'area', 'base', 'br', 'col', 'hr', 'img', 'input', 'link', 'meta', 'source', 'wbr'}

# --- stored outputs

junk = {'a path of the machine': r'(?<![\w.])/(tmp|root|home|Users|work|mnt|opt|usr|var/folders|content|kaggle)/[\w.]|\b[A-Z]:\\\\?Users\b',
        'a progress bar': r'\r|[█▏▎▍▌▋▊▉]|\d+%\||\d\d:\d\d<|<progress',
        'an address in memory': r' at 0x[0-9a-f]{6,}',
        'a traceback': r'Traceback \(most recent call last\)|\x1b\['}

def output_texts(out):
    if out['output_type']=='stream': yield ''.join(out['text'])
    elif out['output_type']=='error': yield '\n'.join(out['traceback'])
    for mime, data in out.get('data', {}).items():
        if not mime.startswith('image/') or mime=='image/svg+xml': yield ''.join(data) if isinstance(data, list) else str(data)

def output_problems(path):
    "What should not be stored in the notebook at `path`"
    for cell in json.loads((nbs/path).read_text(encoding='utf-8'))['cells']:
        for out in cell.get('outputs', []):
            if out['output_type']=='error' and 'expect_fail' not in ''.join(cell['source']):
                yield f'cell {cell["id"]} stores an error, {out["ename"]}: {out["evalue"][:80]}'
            for text in output_texts(out):
                for what, pattern in junk.items():
                    if m := re.search(pattern, text): yield f'cell {cell["id"]} stores {what}: {text[max(0, m.start()-30):m.end()+30]!r}'

# --- files and links

class Page(HTMLParser):
    "What a page holds: ids, links, pictures, headings; and tags that do not close"
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.heads, self.open, self.faults, self.in_head, self.metas = [], [], [], [], [], None, {}
        self.feed(text)
        self.faults += [f'<{o}> is not closed' for o in self.open]
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in void: self.open.append(tag)
        if 'id' in attrs: self.ids.append(attrs['id'])
        for key in ('href', 'src'):
            if key in attrs: self.links.append((tag, attrs[key]))
        if tag=='meta': self.metas[attrs.get('property') or attrs.get('name')] = attrs.get('content')
        if re.fullmatch('h[1-6]', tag): self.heads.append(''); self.in_head = tag
    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in void: self.open.pop()
    def handle_endtag(self, tag):
        if tag==self.in_head: self.in_head = None
        if tag in void: return
        if self.open and self.open[-1]==tag: self.open.pop()
        else: self.faults.append(f'</{tag}> closes {"<"+self.open[-1]+">" if self.open else "nothing"}')
    def handle_data(self, data):
        if self.in_head: self.heads[-1] += data
        # say, a link within a link: nbdev makes a link of `name`, so [`name`](page) cannot be one
        if '](' in data and not {'code', 'script', 'pre'} & {*self.open}: self.faults.append(f'Markdown is left in the text: {data.strip()[:100]!r}')

def link_problem(page, tag, url, pages):
    "What is wrong with a link from `page`, or None"
    cfg = get_config()
    base = page
    if url.startswith(cfg.doc_url): url,base = url.removeprefix(cfg.doc_url) or 'index.html',''
    u = urlsplit(url)
    if u.scheme or u.netloc:
        if tag in ('img', 'script') or tag=='link' and not url.startswith(cfg.doc_url): return f'{url} is loaded from another host'
        blob = f'{cfg.git_url}/blob/{cfg.branch}/'
        if url.startswith(blob) and not (root/unquote(urlsplit(url.removeprefix(blob)).path)).exists(): return f'{url}: there is no such file here'
        return
    to = urljoin(base, unquote(u.path)) if u.path else page
    if to.endswith('/') or not to: to += 'index.html'
    if not (docs/to).is_file(): return f'{url}: there is no {to}'
    if u.fragment and to in pages and unquote(u.fragment) not in pages[to].ids: return f'{url}: {to} has no such anchor'

def squash(text): return re.sub(r'[\W_]+', '', html.unescape(text)).lower()

def headings(path):
    "The headings in the Markdown of the notebook at `path`, but those that nbdev leaves out"
    for cell in json.loads((nbs/path).read_text(encoding='utf-8'))['cells']:
        if cell['cell_type']!='markdown': continue
        text = re.sub(r'^(```|~~~).*?^\1', '', ''.join(cell['source']), flags=re.S|re.M)
        if text.startswith('#') and text.strip().endswith(' -'): continue
        for o in re.findall(r'^#{1,6}\s+(.+?)\s*$', text, flags=re.M):
            o = re.sub(r'\s*\{[#.][^}]*\}$', '', o)
            yield re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', o)

def file_problems():
    paths = notebooks()
    listed = [o for _,os_ in sidebar() for o in os_]
    for o in sorted({*listed} - {*paths}): yield f'sidebar.yml: there is no notebook {o}'
    for o in sorted({*paths} - {*listed}): yield f'{o}: not in sidebar.yml'
    for o in sorted({o for o in listed if listed.count(o)>1}): yield f'sidebar.yml: {o} is there twice'
    for o in paths:
        if not (docs/page_of(o)).is_file(): yield f'{o}: has no page {page_of(o)}'
        for fault in output_problems(o): yield f'{o}: {fault}'
    texts = {p.relative_to(docs).as_posix(): p.read_text(encoding='utf-8') for p in sorted(docs.glob('**/*.html'))}
    pages = {k:Page(v) for k,v in texts.items()}
    made = {page_of(o):o for o in paths}
    for name, page in pages.items():
        if name not in made: yield f'{name}: comes from no notebook'
        for o in page.faults: yield f'{name}: {o}'
        for o in sorted({o for o in page.ids if page.ids.count(o)>1}): yield f'{name}: the id {o} is there twice'
        for tag, url in sorted({*page.links}):
            if p := link_problem(name, tag, url, pages): yield f'{name}: {p}'
        for o in ('og:title', 'og:description', 'og:image', 'og:url', 'twitter:card', 'twitter:image', 'description'):
            if not page.metas.get(o): yield f'{name}: has no {o}'
        for o in ('og:image', 'twitter:image', 'og:url'):
            if p := link_problem(name, 'a', page.metas.get(o) or '', pages): yield f'{name}: {o}: {p}'
        if name in made:
            heads = [squash(o) for o in page.heads]
            for o in headings(made[name]):
                if squash(o) not in heads: yield f'{name}: lacks the heading {o!r}'
    for url in re.findall(r'\((http[^)]+)\)', (docs/'llms.txt').read_text(encoding='utf-8')):
        if p := link_problem('llms.txt', 'a', url, pages): yield f'llms.txt: {p}'

# --- in the browser

def find_browser():
    "Paths of Chromium (or Chrome) and its driver, or None where one is missing"
    first = lambda *names: next((p for o in names if (p := shutil.which(o))), None)
    chrome, driver = first('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'), first('chromedriver')
    return (chrome, driver) if chrome and driver else None

def start(chrome, driver, profile):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    for o in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'disable-dev-shm-usage', 'no-first-run', 'disable-background-networking',
              'disable-component-update', 'disable-sync', f'user-data-dir={profile}'): options.add_argument(f'--{o}')
    return webdriver.Chrome(options=options, service=Service(driver))

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

# what a reader would see, as data
look = '''
const seen = e => { const r = e.getBoundingClientRect(), s = getComputedStyle(e); return r.width > 1 && r.height > 1 && s.visibility == 'visible' && s.opacity > 0 }
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (.2126*r + .7152*g + .0722*b) / 255 }
const style = getComputedStyle(document.body)
return {
  heads: [...document.querySelectorAll('main :is(h1, h2)')].filter(e => !seen(e)).map(e => e.textContent),
  n_heads: document.querySelectorAll('main h1').length,
  images: [...document.images].filter(e => !(e.complete && e.naturalWidth > 0 && seen(e))).map(e => e.getAttribute('src')),
  empty: [...document.querySelectorAll('main :is(table, pre)')].filter(e => !seen(e)).map(e => e.textContent.slice(0, 60)),
  over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  bg: light(style.backgroundColor), fg: light(style.color), nav: !!document.querySelector('#sidebar a[aria-current]'),
  outside: performance.getEntriesByType('resource').map(e => e.name).filter(o => !o.startsWith(location.origin)),
}'''

def page_problems(browser, url, dark, width):
    browser.get(url)
    see = browser.execute_script(look)
    for o in browser.get_log('browser'): yield f'the console says {o["message"]}'
    if see['n_heads']!=1: yield f'{see["n_heads"]} titles'
    for o in see['heads']: yield f'the heading {o!r} is not to be seen'
    for o in see['images']: yield f'the picture {o} is not to be seen'
    for o in see['empty']: yield f'a table or a piece of code is not to be seen: {o!r}'
    for o in see['outside']: yield f'{o} was asked of another host'
    if see['over']>0: yield f'is {see["over"]} pixels wider than the window of {width}'
    if not see['nav']: yield 'is not marked in the sidebar'
    if dark!=(see['bg']<.2) or dark!=(see['fg']>.5): yield f'luminance of the background {see["bg"]:.2f}, of the text {see["fg"]:.2f}'

def site_problems(browser, url):
    "What is wrong with search, the switch and the menu, tried on the first page"
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
    window(browser, False, 1400)
    browser.get(url)
    bg = lambda: browser.execute_script('return getComputedStyle(document.body).backgroundColor')
    was = bg()
    browser.find_element(By.ID, 'theme').click()
    now = bg()
    if now==was: yield 'the switch changes no colours'
    browser.refresh()
    if bg()!=now: yield 'the switch is forgotten when the page is loaded again'
    browser.execute_script('localStorage.clear()')
    browser.get(url)
    browser.find_element(By.ID, 'search').send_keys('byol_views')
    try: WebDriverWait(browser, 5).until(lambda b: b.find_elements(By.CSS_SELECTOR, '#results a'))
    except Exception as e: yield f'search finds nothing: {type(e).__name__}'; return
    hits = [o.get_attribute('href') for o in browser.find_elements(By.CSS_SELECTOR, '#results a')]
    if not hits[0].endswith('views.html#byol_views'): yield f'search for byol_views finds first {hits[0]}'
    browser.find_element(By.ID, 'search').send_keys(Keys.ENTER)
    WebDriverWait(browser, 5).until(lambda b: 'views.html' in b.current_url)
    if browser.execute_script("return document.querySelector('#byol_views').getBoundingClientRect().top")<0: yield 'an anchor is hidden by the bar'
    window(browser, False, 390)
    browser.get(url)
    side = browser.find_element(By.ID, 'sidebar')
    if side.is_displayed(): yield 'the sidebar covers a narrow screen'
    browser.find_element(By.ID, 'menu').click()
    if not side.is_displayed(): yield 'the menu does not open'
    for o in browser.get_log('browser'): yield f'the console says {o["message"]}'

def window(browser, dark, width):
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]})
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False})

def browser_problems(chrome, driver):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=docs))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f'http://127.0.0.1:{server.server_port}/'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = start(chrome, driver, profile)
        try:
            for dark in (False, True):
                for width in (1400, 390):
                    window(browser, dark, width)
                    for p in sorted(docs.glob('**/*.html')):
                        page = p.relative_to(docs).as_posix()
                        for o in page_problems(browser, base+page, dark, width): yield f'{page} ({"dark" if dark else "light"}, {width} wide): {o}'
            for o in site_problems(browser, base+'index.html'): yield f'index.html: {o}'
        finally:
            browser.quit()
            server.shutdown()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--no-browser', action='store_true', help='files and links only')
    args = parser.parse_args()
    os.chdir(root)  # nbdev looks for its settings from the working directory
    if not (docs/'index.html').exists(): sys.exit('There are no pages in _docs/: run `make docs-preview`')
    problems = [*file_problems()]
    found = None if args.no_browser else find_browser()
    if found: problems += browser_problems(*found)
    elif not args.no_browser:
        how = 'chromium and chromedriver (on Debian and Ubuntu: apt-get install chromium chromium-driver)'
        if os.environ.get('CI'): problems.append(f'there is no browser to open the pages in: install {how}')
        else: print(f'NOTE: the pages were not opened in a browser, since there is none. For that, install {how}')
    if problems: sys.exit('\n'.join(['The docs are not in order:', *(f'- {o}' for o in problems)]))
    print('The docs are in order' + (', in the browser, too' if found else ''))

if __name__=='__main__': main()
