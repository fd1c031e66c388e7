// Browsers refuse workers to pages that are opened as files, and the search of this site is a worker. For such pages a
// hidden frame takes the worker's place. The theme loads a script of this name from elsewhere unless it is named here.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = `<!doctype html><head><script>
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done) => {
          const script = document.createElement("script");
          script.onload = script.onerror = done;
          script.src = url;
          document.head.append(script);
        })), Promise.resolve());
      <\/script></head>`;
      this.ready = new Promise((done) => frame.addEventListener("load", done, { once: true })).then(() => {
        const inside = frame.contentWindow;
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        return inside.importScripts(url).then(() => inside);
      });
      document.body.append(frame);
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
