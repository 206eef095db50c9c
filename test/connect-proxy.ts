/** A proxy of the tests' own, which tunnels by CONNECT: whatever host is asked for, it is a port of this machine. */
import http from 'node:http';
import net from 'node:net';

export class ConnectProxy {
  /** Hosts that tunnels were made to, without ports. */
  readonly asked: string[] = [];
  readonly #server: http.Server;
  readonly #sockets = new Set<net.Socket>();

  /** @param user `name:password` that it wants to be told. */
  constructor(user: string) {
    const wanted = `Basic ${Buffer.from(user).toString('base64')}`;
    this.#server = http.createServer((_, response) => {
      response.writeHead(405).end();
    });
    this.#server.on('connect', (request, socket: net.Socket, head: Buffer) => {
      this.#hold(socket);
      if (request.headers['proxy-authorization'] !== wanted) {
        socket.end('HTTP/1.1 407 Proxy Authentication Required\r\n\r\n');
        return;
      }
      const { hostname, port } = new URL(`http://${request.url!}`);
      this.asked.push(hostname);
      const upstream = net.connect(Number(port), '127.0.0.1', () => {
        socket.write('HTTP/1.1 200 Connection established\r\n\r\n');
        upstream.write(head);
        upstream.pipe(socket).pipe(upstream);
      });
      this.#hold(upstream);
    });
  }

  async start(): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
  }

  url(user: string): string {
    return `http://${user}@127.0.0.1:${(this.#server.address() as net.AddressInfo).port}`;
  }

  stop(): void {
    this.#server.close();
    for (const socket of this.#sockets) socket.destroy();
  }

  #hold(socket: net.Socket): void {
    this.#sockets.add(socket);
    socket.on('error', () => undefined);
    socket.on('close', () => this.#sockets.delete(socket));
  }
}
