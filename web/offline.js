// index.html's service worker: keeps the files that the page names once its network runs, and
// answers with them when the network does not.
addEventListener("message", (event) => event.waitUntil(keep(event.data)));

addEventListener("fetch", (event) =>
  event.respondWith(
    fetch(event.request).catch(
      async () =>
        (await caches.match(event.request, { ignoreSearch: true, ignoreVary: true })) ??
        Response.error(),
    ),
  ),
);

/** Keeps all files or none, as the browser has just got them for the page: so they fit together. */
async function keep(files) {
  const cache = await caches.open("tpsnet");
  await cache.addAll(files.map((file) => new Request(file, { cache: "force-cache" })));
}
