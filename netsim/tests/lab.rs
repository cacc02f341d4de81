//! What a lab promises apart from NAT: connectivity, isolation, and nothing left behind.
use netsim::*;
use std::time::Instant;
fn main() {
    enter_user_namespace().unwrap();
    for kind in RouterKind::ALL {
        let t = Instant::now();
        let mut lab = Lab::new(1).unwrap();
        let t1 = t.elapsed();
        let s = lab.add_server("s").unwrap();
        let a = lab.add_site("a", SiteConfig::new(kind).hosts(2).ipv6(true)).unwrap();
        let _b = lab.add_site("b", SiteConfig::new(RouterKind::EimApdf)).unwrap();
        let built = t.elapsed();
        let mut oks = vec![];
        for ip in [std::net::IpAddr::from(s.ipv4()), s.ipv6().unwrap().into()] {
            let _l = s.run(|| std::net::TcpListener::bind((ip, 443)).unwrap());
            oks.push(a.host(0).run(|| {
                std::net::TcpStream::connect_timeout(&(ip, 443).into(), std::time::Duration::from_secs(1))
                    .map(|s| s.local_addr().unwrap())
            }));
            let u = s.run(|| std::net::UdpSocket::bind((ip, 443)).unwrap());
            u.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
            oks.push(a.host(0).run(|| {
                let c = std::net::UdpSocket::bind("[::]:0")
                    .or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))
                    .unwrap();
                c.send_to(b"x", (ip, 443)).unwrap();
                u.recv_from(&mut [0; 10]).map(|(_, a)| a)
            }));
        }
        let t = Instant::now();
        drop(lab);
        drop((a, s, _b));
        println!("{kind}: core {t1:?} built {built:?} {oks:?} drop {:?}", t.elapsed());
    }
}
